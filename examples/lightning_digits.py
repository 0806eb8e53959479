"""Lightning: FusedSGD in configure_optimizers, gradients clipped by the Trainer, a checkpoint resumed.

Run as `python examples/lightning_digits.py`; needs the extra "integrations". Imported by its test.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import needs

with needs.extra("integrations", __file__):
    import lightning
    import torch
    from digits_training import build_model, load_split
    from torch import Tensor
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader, TensorDataset

    from wd_fused import FusedSGD, weight_decay_param_groups


class DigitsModule(lightning.LightningModule):
    optimizer_class = FusedSGD

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model = build_model(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).double().mean())

    def configure_optimizers(self) -> Any:
        groups = weight_decay_param_groups(self, 5e-4)
        optimizer = self.optimizer_class(groups, lr=0.05, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    digits = load_split()
    training = TensorDataset(digits.train_images, digits.train_labels)
    validation = TensorDataset(digits.validation_images, digits.validation_labels)
    return DataLoader(training, batch_size=64), DataLoader(validation, batch_size=450)


def trainer(folder: Path | str, **options: Any) -> lightning.Trainer:
    common = {"accelerator": "cpu", "gradient_clip_val": 1.0}
    common |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(default_root_dir=folder, **(common | options))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        each_epoch = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        whole, resumed = DigitsModule(), DigitsModule()
        trainer(folder, max_epochs=4, callbacks=[each_epoch]).fit(whole, *loaders())
        again = trainer(folder, max_epochs=4, enable_checkpointing=False)
        again.fit(resumed, *loaders(), ckpt_path=f"{folder}/epoch=1.ckpt")
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    print(f"stepped by: {sorted({choice.backend for choice in again.optimizers[0].backends()})}")
    print(f"validation accuracy: {again.callback_metrics['accuracy']:.1%}; resumed with the same bits: {same}")
