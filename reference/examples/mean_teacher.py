"""A mean teacher: one network learns, its moving average teaches where it is the more confident; `students=(0,)`."""

import torch
from monai.networks.nets import BasicUNet
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy import dice, discs

import rplib


def main(iterations: int = 80, decay: float = 0.95) -> tuple[float, float]:
    torch.manual_seed(0)
    (labelled, labels), (unlabelled, _) = discs(4, seed=0), discs(28, seed=1)
    student = BasicUNet(spatial_dims=2, out_channels=2, features=(8, 8, 16, 16, 32, 8))
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    tap = rplib.FeatureTap([student, teacher])
    objective = rplib.MutualObjective(students=(0,))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)

    for iteration in range(1, iterations + 1):
        mine, others = torch.randint(4, (2,)), torch.randint(28, (2,))
        images = torch.cat([labelled[mine], unlabelled[others]])
        logits = student(images + 0.1 * torch.randn_like(images))  # the two see different noise
        with torch.no_grad():
            taught_by = teacher(images + 0.1 * torch.randn_like(images))
        terms = objective([logits, taught_by], tap.features(), labels[mine], 0.1 * rplib.ramp(iteration, every=1))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        teacher.update_parameters(student)
        if iteration % 20 == 0:
            print(f"iteration {iteration}: supervised {terms.dice:.3f}, mutual {terms.mutual:.3f}")

    found = dice(student), dice(teacher)
    print(f"Dice {found[0]:.3f}, of the teacher {found[1]:.3f}")
    return found


if __name__ == "__main__":
    main()
