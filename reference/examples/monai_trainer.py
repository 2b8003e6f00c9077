"""MONAI's SupervisedTrainer without subclassing: one module holds both networks, and the objective is the loss function."""

import torch
from monai.engines import SupervisedTrainer
from monai.handlers import StatsHandler
from monai.networks.nets import BasicUNet
from toy import dice, discs

import rplib


class Pair(torch.nn.Module):
    """Two networks that see the same images; in evaluation mode, only the first is used."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module) -> None:
        super().__init__()
        self.networks = torch.nn.ModuleList([first, second])

    def forward(self, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        return [network(images) for network in self.networks] if self.training else self.networks[0](images)


class PairLoss:
    """The loss function: called with the outputs, and the labels of the labelled samples, which come first in the batch."""

    def __init__(self, pair: Pair, weight: float = 0.1, ramp_every: int = 1) -> None:
        self.tap, self.objective = rplib.FeatureTap(pair.networks), rplib.MutualObjective()
        self.weight, self.every, self.iteration = weight, ramp_every, 0

    def __call__(self, logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        self.iteration += 1
        weight = self.weight * rplib.ramp(self.iteration, every=self.every)
        return self.objective(logits, self.tap.features(), labels, weight).total


def batches() -> list[dict[str, torch.Tensor]]:
    """15 batches of 2 labelled and 2 unlabelled images, and the labels of the first two."""
    (images, labels), (others, _) = discs(4, seed=0), discs(30, seed=1)
    mine = [slice(i % 2, None, 2) for i in range(15)]
    return [{"image": torch.cat([images[m], others[2 * i : 2 * i + 2]]), "label": labels[m]} for i, m in enumerate(mine)]


def main(epochs: int = 4) -> float:
    torch.manual_seed(0)
    pair = Pair(*(BasicUNet(spatial_dims=2, out_channels=2, features=(8, 8, 16, 16, 32, 8)) for _ in range(2)))
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=epochs, train_data_loader=batches(), network=pair,
        optimizer=torch.optim.SGD(pair.parameters(), lr=0.05, momentum=0.9), loss_function=PairLoss(pair),
        train_handlers=[StatsHandler(output_transform=lambda output: output["loss"])],
        decollate=False,  # images and labels of a batch differ in number
    )  # fmt: skip
    trainer.run()
    found = dice(pair, seed=99)
    print(f"Dice {found:.3f}")
    return found


if __name__ == "__main__":
    main()
