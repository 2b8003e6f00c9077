"""Cross pseudo supervision: two networks, each with a supervised loss, teach each other on the whole batch."""

import math

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from toy import dice, discs

import rplib

ITERATIONS, LABELLED, RAMP_UP, WEIGHT = 60, 2, 40, 0.1


def consistency_weight(iteration):
    return WEIGHT * math.exp(-5 * (1 - min(iteration / RAMP_UP, 1)) ** 2)


def new_network():
    network = BasicUNet(spatial_dims=2, out_channels=2, features=(8, 8, 16, 16, 32, 8))
    return network, torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def main():
    torch.manual_seed(0)
    (labelled, labels), (unlabelled, _) = discs(4, seed=0), discs(28, seed=1)
    (network_1, optimizer_1), (network_2, optimizer_2) = new_network(), new_network()
    supervised = DiceCELoss(to_onehot_y=True, softmax=True)
    tap, mutual_loss = rplib.FeatureTap([network_1, network_2]), rplib.ReliableMutualLoss()

    for iteration in range(ITERATIONS):
        mine, others = torch.randint(4, (LABELLED,)), torch.randint(28, (2,))
        images, target = torch.cat([labelled[mine], unlabelled[others]]), labels[mine].unsqueeze(1)
        logits_1, logits_2 = network_1(images), network_2(images)
        loss = supervised(logits_1[:LABELLED], target) / 2 + supervised(logits_2[:LABELLED], target) / 2

        mutual = mutual_loss([logits_1, logits_2], tap.features())
        loss = loss + consistency_weight(iteration) * mutual

        optimizer_1.zero_grad()
        optimizer_2.zero_grad()
        loss.backward()
        optimizer_1.step()
        optimizer_2.step()

    found = dice(network_1)
    print(f"mutual {mutual:.4f}, Dice {found:.3f}")
    return found


if __name__ == "__main__":
    main()
