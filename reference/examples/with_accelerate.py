"""Hugging Face accelerate: both networks in one module, the objective over all processes (`accelerate launch`)."""

import torch
from accelerate import Accelerator
from monai.networks.nets import BasicUNet
from torch.utils.data import DataLoader, TensorDataset
from toy import dice, discs

import rplib


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        unets = (BasicUNet(spatial_dims=2, out_channels=2, features=(8, 8, 16, 16, 32, 8)) for _ in range(2))
        self.networks = torch.nn.ModuleList(unets)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [network(images) for network in self.networks]


def main(epochs: int = 4, mixed_precision: str = "no") -> float:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    pair = Pair()
    tap = rplib.FeatureTap(pair.networks)  # before prepare
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.05, momentum=0.9)
    labelled = DataLoader(TensorDataset(*discs(4, seed=0)), batch_size=2)
    unlabelled = DataLoader(TensorDataset(discs(30, seed=1)[0]), batch_size=2)
    model, optimizer, labelled, unlabelled = accelerator.prepare(pair, optimizer, labelled, unlabelled)
    objective = rplib.MutualObjective(process_group="world" if accelerator.num_processes > 1 else None)

    step = 0
    for _ in range(epochs):
        mine = iter(labelled)
        for (others,) in unlabelled:
            step += 1
            batch = next(mine, None)
            if batch is None:
                mine = iter(labelled)
                batch = next(mine)
            images, labels = batch
            with accelerator.autocast():
                logits = model(torch.cat([images, others]))
            terms = objective(logits, tap.features(), labels, 0.1 * rplib.ramp(step, every=1))
            optimizer.zero_grad()
            accelerator.backward(terms.total)
            optimizer.step()
    found = dice(accelerator.unwrap_model(model).networks[0])
    accelerator.print(f"Dice {found:.3f}")
    return found


if __name__ == "__main__":
    main()
