"""FusedSGD in the training frameworks that people use, each trained for real: `make integrations`."""
