"""Scribbles: a few labelled voxels per image, 255 elsewhere; cross-entropy on those voxels, pseudo-labels everywhere."""

import torch
from monai.networks.nets import BasicUNet
from toy import dice, discs

import rplib

UNLABELLED = 255


def scribbled(labels: torch.Tensor, seed: int = 3, share: float = 0.03) -> torch.Tensor:
    """Keep the given share of each image's labels and set the others to 255."""
    kept = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(kept, labels, UNLABELLED)


def main(iterations: int = 80) -> float:
    torch.manual_seed(0)
    images, labels = discs(16, seed=0)
    scribbles = scribbled(labels)
    networks = [BasicUNet(spatial_dims=2, out_channels=2, features=(8, 8, 16, 16, 32, 8)) for _ in range(2)]
    tap = rplib.FeatureTap(networks)
    objective = rplib.MutualObjective(supervised="cross_entropy", ignore_index=UNLABELLED)
    optimizer = torch.optim.SGD([p for network in networks for p in network.parameters()], lr=0.05, momentum=0.9)

    for iteration in range(1, iterations + 1):
        batch = torch.randint(16, (4,))  # every image has scribbles: the target covers the whole batch
        logits = [network(images[batch]) for network in networks]
        terms = objective(logits, tap.features(), scribbles[batch], 0.1 * rplib.ramp(iteration, every=1))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        if iteration % 20 == 0:
            print(f"iteration {iteration}: supervised {terms.dice:.3f}, mutual {terms.mutual:.3f}")

    found = dice(networks[0])
    print(f"Dice {found:.3f}")
    return found


if __name__ == "__main__":
    main()
