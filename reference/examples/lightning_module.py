"""A LightningModule with labelled and unlabelled loaders, on any number of processes: `python lightning_module.py 2`."""

import sys

import lightning
import torch
from lightning.pytorch.utilities import CombinedLoader
from monai.networks.nets import BasicUNet
from torch.utils.data import DataLoader, TensorDataset
from toy import dice, discs

import rplib


class MutualModule(lightning.LightningModule):
    def __init__(self, lr: float = 0.05, consistency: float = 0.1, ramp_every: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        unets = (BasicUNet(spatial_dims=2, out_channels=2, features=(8, 8, 16, 16, 32, 8)) for _ in range(2))
        self.networks = torch.nn.ModuleList(unets)

    def on_fit_start(self) -> None:  # not in __init__, which does not know the number of processes
        group = "world" if self.trainer.world_size > 1 else None
        self.tap, self.objective = rplib.FeatureTap(self.networks), rplib.MutualObjective(process_group=group)

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        (labelled, labels), (unlabelled,) = batch["labelled"], batch["unlabelled"]
        images = torch.cat([labelled, unlabelled])
        logits = [network(images) for network in self.networks]
        weight = self.hparams.consistency * rplib.ramp(self.global_step + 1, every=self.hparams.ramp_every)
        terms = self.objective(logits, self.tap.features(), labels, weight)
        self.log_dict({"supervised": terms.dice, "mutual": terms.mutual, "weight": weight}, prog_bar=True)
        return terms.total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def main(processes: int = 1, epochs: int = 4, steps: int = -1) -> MutualModule:
    lightning.seed_everything(0)
    labelled = DataLoader(TensorDataset(*discs(4, seed=0)), batch_size=2 // processes)
    unlabelled = DataLoader(TensorDataset(discs(30, seed=1)[0]), batch_size=2 // processes)
    loaders = CombinedLoader({"labelled": labelled, "unlabelled": unlabelled}, "max_size_cycle")
    module = MutualModule()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=epochs,
        max_steps=steps, logger=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, loaders)
    if trainer.is_global_zero:
        print(f"Dice {dice(module.networks[0]):.3f}")
    return module


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
