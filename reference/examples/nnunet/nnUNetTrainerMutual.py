"""An nnU-Net v2 trainer that also learns from unlabelled cases: two networks of the plan teach each other.

python add_unlabelled.py $nnUNet_raw/Dataset001_NAME       # once, before plan and preprocess
export nnUNet_extTrainer=<this folder>
nnUNetv2_train 1 3d_fullres 0 -tr nnUNetTrainerMutual      # and nnUNetv2_predict -d 1 ... -tr nnUNetTrainerMutual
"""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

import rplib


class Pair(torch.nn.Module):
    """Returns the outputs of both networks in training, else those of the first, which validation and prediction use."""

    def __init__(self, *networks: torch.nn.Module) -> None:
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)
        # By name, because on a GPU nnU-Net compiles the network before its first pass.
        last = f"decoder.seg_layers.{len(networks[0].decoder.seg_layers) - 1}"
        self.tap = rplib.FeatureTap(self.networks, layer=last)

    def forward(self, images: torch.Tensor) -> list:
        return [network(images) for network in self.networks] if self.training else self.networks[0](images)


class nnUNetTrainerMutual(nnUNetTrainer):  # noqa: N801
    consistency, ramp_epochs = 0.1, 200

    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels,
                                   enable_deep_supervision=True):  # fmt: skip
        arguments = plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        return Pair(*(nnUNetTrainer.build_network_architecture(*arguments) for _ in range(2)))

    def set_deep_supervision_enabled(self, enabled):
        for network in self.network.networks:
            network.decoder.deep_supervision = enabled

    def do_split(self):
        """Use only labelled cases for validation, and repeat them in training until half of the draws are labelled."""
        unlabelled = sorted(self.dataset_json["unlabelled"])
        train, val = ([name for name in names if name not in unlabelled] for names in super().do_split())
        return train * max(1, len(unlabelled) // len(train)) + unlabelled, val

    def _build_loss(self):
        supervised, mutual = super()._build_loss(), rplib.ReliableMutualLoss()  # nnU-Net's own loss skips 'ignore' voxels

        def loss(outputs, target):
            if not isinstance(outputs[0], list | tuple):  # validation: one network's outputs at all resolutions
                return supervised(outputs, target)
            weight = self.consistency * rplib.ramp(self.current_epoch + 1, length=self.ramp_epochs, every=1)
            self.mutual = mutual([output[0] for output in outputs], self.network.tap.features())
            return sum(supervised(output, target) for output in outputs) / 2 + weight * self.mutual

        return loss
