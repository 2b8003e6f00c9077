"""Two MONAI networks in a plain training loop: 4 labelled and 28 unlabelled images, no change to the networks."""

import torch
from monai.networks.nets import BasicUNet
from toy import dice, discs

import rplib


def main(iterations: int = 60) -> float:
    torch.manual_seed(0)
    labelled, labels = discs(4, seed=0)
    unlabelled, _ = discs(28, seed=1)

    networks = [BasicUNet(spatial_dims=2, out_channels=2, features=(8, 8, 16, 16, 32, 8)) for _ in range(2)]
    tap = rplib.FeatureTap(networks)  # records the input of each network's last convolution
    objective = rplib.MutualObjective()
    optimizer = torch.optim.SGD([p for network in networks for p in network.parameters()], lr=0.05, momentum=0.9)

    for iteration in range(1, iterations + 1):
        mine, others = torch.randint(4, (2,)), torch.randint(28, (2,))
        images = torch.cat([labelled[mine], unlabelled[others]])  # labelled samples first
        logits = [network(images) for network in networks]
        weight = 0.1 * rplib.ramp(iteration, every=1)
        terms = objective(logits, tap.features(), labels[mine], consistency_weight=weight)
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
