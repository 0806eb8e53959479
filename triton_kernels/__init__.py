"""The Triton twins of csrc/, installed as wd_fused.triton_kernels. There are no kernels here yet."""
