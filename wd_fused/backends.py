"""Which backends this machine has, and which one a parameter gets. Used by sgd.py, functional.py and the report.

A backend is named here and nowhere else; sgd.py knows only the methods of a plan.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from wd_fused import extension
from wd_fused.options.spec import RowTail, TailStep
from wd_fused.step.extents import missing_memory

Numerics = Literal["torch", "opmath"]
NUMERICS: tuple[Numerics, ...] = ("torch", "opmath")


class Row(NamedTuple):
    """A parameter as a plan sees it: its momentum buffer if it has one, its group, its place in the group."""

    param: Tensor
    momentum_buffer: Tensor | None
    group: int
    position: int
    tail: RowTail | None = None  # where an option of the tail is on for its group


class Plan(Protocol):
    """A step over fixed rows, in two calls, so that several plans can all check before any writes.

    ``tail`` is None where no group has an option of the tail; a backend that does not take them is never given one.
    """

    def prepare(self, groups: list[dict[str, Any]], state: dict[Tensor, Any], tail: TailStep | None = ..., /) -> int:
        """Checks everything, writes nothing. -1: no longer what the plan was built on; else how many rows it leaves."""

    def left(self) -> list[tuple[int, str]]:
        """The rows that the last prepare() leaves to torch's code, with the reason."""

    def keep_off(self, others: list[tuple[int, int]]) -> bool:
        """Whether a row lies in memory that others write, [begin, end). A row that moves there later ends the plan."""

    def abandon(self) -> None:
        """Forgets what prepare() read: launch() will not come."""

    def sums(self, grad_scale: Tensor | None = ..., /) -> list[Tensor]:
        """After prepare(): on each device of the plan the groups' sums of squared gradients, float64 [groups].

        Of the groups that clip, zero for the others; of the rows that the plan steps itself.
        """

    def launch(
        self, coefficients: Sequence[float] | Tensor | None = ..., grad_scale: Tensor | None = ..., /
    ) -> list[tuple[int, Tensor]]:
        """Does the step; the momentum buffers that it made, with their rows.

        ``coefficients``: what each group's gradients are multiplied with to clip them, float64 on the CPU, 1.0 where
        a group does not clip; None: no group does.
        """

    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        tail: TailStep | None = ...,
        /,
    ) -> list[tuple[int, Tensor]] | None:
        """prepare() and launch() in one where nothing is left to others; else None, and nothing is done.

        ``grad_scale`` and ``found_inf`` are torch.amp.GradScaler's: a plan that can have them read on its device does
        so, and one that cannot says None. Norm and coefficients are formed where the rows are, if on one device.
        """

    def grad_norm(self) -> Tensor | None:
        """The norm of the last step() that clipped, of TailStep.norm_dtype: [] or [groups]; the plan's own tensor."""

    def was_skipped(self) -> bool:
        """Whether the last step() wrote nothing for a non-finite norm under a scale, where the host knows."""

    def read_state(self, state: dict[Tensor, Any]) -> None:
        """Takes the state as it is now for what the plan was built on."""


class Backend(Protocol):
    """What the rest of the package asks of a backend."""

    takes_tail: bool  # whether its plans know the options of the tail

    def unavailable(self) -> str | None:
        """Why this machine cannot use it, with the remedy; None if it can."""

    def module(self) -> ModuleType | None:
        """The C++ extension, which reads a plan's tensors, if it is there."""

    def refusal(self, tensor: Tensor) -> str | None:
        """Why it does not take this parameter or momentum buffer; None if it does."""

    def surely_taken(self, params: list[Tensor], state: dict[Tensor, Any]) -> list[Any] | None:
        """In one pass in C++: the momentum buffer or None of each parameter that it takes for certain, without options;
        False where refusal() has to be asked. None: there is no such pass."""

    def plan(
        self, rows: Sequence[Row], groups: list[list[Tensor]], state: dict[Tensor, Any], numerics: Numerics
    ) -> Plan: ...

    def sgd(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor | None],
        hyperparameters: dict[str, Any],
        numerics: Numerics,
    ) -> list[Tensor | None]:
        """One step without a plan; the momentum buffers, those that it made among them."""


class CompiledBackend:
    """The C++ extension: its loops over CPU tensors ("cpu"), or its CUDA kernels ("cuda")."""

    takes_tail = True

    def __init__(self, target: Literal["cpu", "cuda"]) -> None:
        self.target = target
        self._is_known_to_be_there = False

    def unavailable(self) -> str | None:
        if self._is_known_to_be_there:  # asked for every parameter, and torch may ask the driver each time
            return None
        if self.target == "cuda" and (reason := _why_no_gpu()) is not None:
            return reason  # before the extension is looked for: it may have to be built
        module = self.module()
        if module is None:
            return extension.status().reason
        if self.target == "cuda" and module.cuda_architectures() is None:
            return f"the C++ extension has no CUDA part: {extension.status().cuda}"
        self._is_known_to_be_there = True
        return None

    def module(self) -> ModuleType | None:
        return extension.load()

    def refusal(self, tensor: Tensor) -> str | None:
        if (reason := self.unavailable() or _why_not_its_type(tensor)) is not None:
            return reason
        module = self.module()
        assert module is not None, "unavailable() would have said so"
        answer: str | None = module.why_not_planned(tensor, self.target)
        return answer

    def surely_taken(self, params: list[Tensor], state: dict[Tensor, Any]) -> list[Any] | None:
        module = None if self.unavailable() else self.module()
        answer: list[Any] | None = None if module is None else module.surely_taken(params, state, self.target)
        return answer

    def plan(
        self, rows: Sequence[Row], groups: list[list[Tensor]], state: dict[Tensor, Any], numerics: Numerics
    ) -> Plan:
        module = self.module()
        assert module is not None, "asked for only after unavailable() said None"
        plan: Plan = module.StepPlan(list(rows), groups, state, numerics, self.target)
        return plan

    def sgd(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor | None],
        hyperparameters: dict[str, Any],
        numerics: Numerics,
    ) -> list[Tensor | None]:
        buffers, first_steps = _buffers_of_a_step(params, momentum_buffers, hyperparameters)
        opmath = numerics == "opmath"
        torch.ops.wd_fused.sgd_(params, grads, buffers, first_steps, **hyperparameters, opmath=opmath)
        return [*buffers] or [None] * len(params)


def _buffers_of_a_step(
    params: list[Tensor], momentum_buffers: list[Tensor | None], hyperparameters: dict[str, Any]
) -> tuple[list[Tensor], list[bool]]:
    """As the operator wants them, and which of them it is to fill; none without momentum."""
    if hyperparameters["momentum"] == 0:
        return [], []
    pairs = zip(params, momentum_buffers, strict=True)
    buffers = [torch.empty_like(param) if buffer is None else buffer for param, buffer in pairs]
    return buffers, [buffer is None for buffer in momentum_buffers]


def _why_no_gpu() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no GPU that it can use (torch.cuda.is_available() is False: no NVIDIA GPU, or no driver)"
    return None


class TritonBackend:
    """The Triton kernels of triton_kernels: GPUs without a CUDA toolkit. The C++ extension reads the tensors."""

    takes_tail = True

    def __init__(self) -> None:
        self._is_known_to_be_there = False

    def unavailable(self) -> str | None:
        if self._is_known_to_be_there:
            return None
        try:
            triton_kernels()
        except ImportError as error:
            missing = str(error.name).split(".")[0]
            remedy = "; pip install triton" if missing == "triton" else ""
            return f"its kernels cannot be imported: {error}{remedy}"
        if not torch.cuda.is_available():
            return "torch finds no GPU that it can use (torch.cuda.is_available() is False)"
        if self.module() is None:
            return (
                "it needs the CPU part of the C++ extension, which any C++ compiler builds, and that is not there: "
                f"{extension.status().reason}"
            )
        self._is_known_to_be_there = True
        return None

    def module(self) -> ModuleType | None:
        return extension.load()

    def refusal(self, tensor: Tensor) -> str | None:
        if (reason := self.unavailable() or _why_not_its_type(tensor)) is not None:
            return reason
        module = self.module()
        assert module is not None, "unavailable() would have said so"
        answer: str | None = module.why_not_planned(tensor, "hosted")
        return answer or triton_kernels().why_not_on(tensor.device, tensor.dtype)

    def surely_taken(self, params: list[Tensor], state: dict[Tensor, Any]) -> list[Any] | None:
        return None

    def plan(
        self, rows: Sequence[Row], groups: list[list[Tensor]], state: dict[Tensor, Any], numerics: Numerics
    ) -> Plan:
        module = self.module()
        assert module is not None, "asked for only after unavailable() said None"
        plan: Plan = module.StepPlan(list(rows), groups, state, numerics, "hosted", triton_kernels().DeviceStep)
        return plan

    def sgd(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor | None],
        hyperparameters: dict[str, Any],
        numerics: Numerics,
    ) -> list[Tensor | None]:
        module = self.module()
        assert module is not None, "asked for only after unavailable() said None"
        buffers, first_steps = _buffers_of_a_step(params, momentum_buffers, hyperparameters)
        host = triton_kernels().DeviceStep
        module.hosted_sgd(params, grads, buffers, first_steps, **hyperparameters, numerics=numerics, make_host=host)
        return [*buffers] or [None] * len(params)


@functools.cache
def triton_kernels() -> ModuleType:
    """wd_fused.triton_kernels, and Triton with it: in a checkout beside this package, in an installed one inside it.

    Raises ImportError where they are not, or Triton is not.
    """
    name = "wd_fused.triton_kernels"
    beside = Path(__file__).resolve().parent.parent / "triton_kernels"
    if name in sys.modules or not (beside / "__init__.py").is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(
        name, beside / "__init__.py", submodule_search_locations=[str(beside)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _why_not_its_type(tensor: Tensor) -> str | None:
    if _torch_function(type(tensor)) in _OWN_TORCH_FUNCTIONS:
        return None
    return f"it is a {type(tensor).__name__}, a tensor subclass with its own __torch_function__"


def _torch_function(tensor_type: type[Tensor]) -> object:
    function = tensor_type.__torch_function__
    return getattr(function, "__func__", function)  # a classmethod is bound anew for each subclass


_OWN_TORCH_FUNCTIONS = (_torch_function(Tensor), _torch_function(torch.nn.Parameter))

FUSED: dict[str, Backend] = {
    "cuda": CompiledBackend("cuda"),
    "triton": TritonBackend(),
    "cpu": CompiledBackend("cpu"),
}
NAMES = ("auto", *FUSED, "torch")
# "auto": the fused backends that a device's parameters are offered to, in this order; then torch.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def available() -> dict[str, str | None]:
    """Every backend's name, with None where this machine can use it, else the reason and the remedy."""
    return {name: backend.unavailable() for name, backend in FUSED.items()} | {"torch": None}


def wanted(backend: str) -> str:
    """The backend to use for the argument ``backend``: "auto" gives way to the variable WD_FUSED_BACKEND.

    Raises ValueError for a name that does not exist and RuntimeError for a backend that this machine lacks.
    """
    source = f"backend={backend!r}"
    if backend == "auto" and "WD_FUSED_BACKEND" in os.environ:
        backend = os.environ["WD_FUSED_BACKEND"]
        source = f"the environment variable WD_FUSED_BACKEND={backend!r}"
    if backend not in NAMES:
        raise ValueError(f"Invalid {source}: choose one of {_listed(NAMES)}")
    if backend in FUSED and (reason := FUSED[backend].unavailable()) is not None:
        usable = [name for name, missing in available().items() if missing is None]
        raise RuntimeError(
            f"{source} cannot be used: {reason}. Usable here: {_listed(usable)}; "
            'backend="auto" takes the best of them for each parameter'
        )
    return backend


def checked_numerics(numerics: str, backend: str) -> Numerics:
    """``numerics`` if it is one; ValueError if not, or if the backend cannot honour it."""
    for known in NUMERICS:
        if numerics == known:
            if known == "opmath" and backend == "torch":
                raise ValueError(
                    'numerics="opmath" needs a fused backend: torch\'s own code rounds every intermediate. '
                    'Use numerics="torch" or another backend'
                )
            return known
    raise ValueError(f"Invalid numerics={numerics!r}: choose one of {_listed(NUMERICS)}")


def any_usable(device: torch.device, backend: str) -> bool:
    """Whether some fused backend may take parameters on ``device`` where ``backend`` is wanted."""
    return any(FUSED[name].unavailable() is None for name in _candidates(device, backend))


def choose(tensor: Tensor, backend: str) -> tuple[str, str]:
    """The backend that takes ``tensor`` where ``backend`` is wanted ("auto" or a name), and why that one."""
    if backend == "torch":
        return "torch", "it was asked for"
    candidates = _candidates(tensor.device, backend)
    reasons: list[str] = []
    for name in candidates:
        reason = FUSED[name].refusal(tensor)
        if reason is None and backend != "auto":
            return name, "it was asked for"
        if reason is None:
            return name, "; ".join([f"it is the {'next' if reasons else 'first'} choice for {tensor.device}", *reasons])
        reasons.append(f"{name}: {reason}" if len(candidates) > 1 else reason)
    return "torch", "; ".join(reasons) or f"it is on {tensor.device}, for which there is no fused backend"


def surely_taken(params: list[Tensor], state: dict[Tensor, Any], backend: str) -> tuple[str, list[Any]]:
    """The first choice for the parameters' device where ``backend`` is wanted, and which of them it surely takes: their
    momentum buffers, or None; False of those for which choose() has to be asked, and more."""
    names = _candidates(params[0].device, backend) if params else ()
    taken = FUSED[names[0]].surely_taken(params, state) if names else None
    return ("torch", [False] * len(params)) if taken is None else (names[0], taken)


def objection_of_torch(param: Tensor, grad: Tensor, buffer: Any, weight_decay: float | Tensor) -> str | None:
    """What torch's code would fail on in the middle of a step, with the remedy, or None."""
    if grad.shape != param.shape:
        return f"its gradient has shape {list(grad.shape)}, the parameter {list(param.shape)}"
    if grad.device != param.device:
        return f"its gradient is on {grad.device}, the parameter on {param.device}"
    if buffer is not None and not isinstance(buffer, Tensor):
        return f"its momentum buffer is a {type(buffer).__name__}, not a Tensor"
    if (reason := why_not_written(param, grad, buffer)) is not None:
        return reason
    if grad.is_sparse and weight_decay != 0:
        return (
            f"its gradient is sparse, which torch cannot add weight_decay={weight_decay} to; put it into a parameter "
            "group with weight_decay=0"
        )
    update = torch.promote_types(grad.dtype, param.dtype) if weight_decay != 0 else grad.dtype
    if isinstance(buffer, Tensor):
        fits = (buffer.shape, buffer.device) == (param.shape, param.device) and buffer.is_sparse <= grad.is_sparse
        if not (fits and torch.can_cast(update, buffer.dtype)):
            return (
                f"its momentum buffer is {described(buffer)}, its gradient {described(grad)}, the parameter "
                f"{described(param)}; del optimizer.state[parameter] starts the buffer afresh"
            )
        update = buffer.dtype
    if not torch.can_cast(update, param.dtype):
        return f"its gradient is {described(grad)}, which cannot be used for {described(param)}"
    return None


def why_not_written(param: Tensor, grad: Tensor, buffer: Tensor | None) -> str | None:
    """Why torch's operators would fail, or worse, on the memory of these."""
    for name, tensor in (("it", param), ("its gradient", grad), ("its momentum buffer", buffer)):
        if tensor is None:
            continue
        if (missing := missing_memory(tensor)) is not None:
            return f"{name} {missing}"
        if tensor is not grad and tensor.is_inference() and not torch.is_inference_mode_enabled():
            return f"{name} was made in inference mode, and cannot be written outside of it: put a clone() in its place"
    return None


def described(tensor: Tensor) -> str:
    sparse = "sparse " if tensor.is_sparse else ""
    return f"{sparse}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _candidates(device: torch.device, backend: str) -> tuple[str, ...]:
    if backend == "auto":
        return PREFERENCE.get(device.type, ())
    return () if backend == "torch" else (backend,)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
