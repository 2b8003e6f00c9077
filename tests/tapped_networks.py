"""Small networks in the shapes that people write them in, for the tests of the tap."""

import torch
from torch import nn


class Plain(nn.Module):
    """In the style of SSL4MIS: blocks, upsampling, a skip, and out_conv on features at full resolution."""

    def __init__(self, dims: int = 2, width: int = 6, classes: int = 2, has_dropout: bool = True):
        super().__init__()
        conv, up = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        norm = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
        self.block_one = nn.Sequential(conv(1, width, 3, padding=1), norm(width), nn.ReLU(inplace=True))
        self.block_one_dw = nn.Sequential(conv(width, 2 * width, 2, stride=2), nn.ReLU(inplace=True))
        self.block_one_up = nn.Sequential(up(2 * width, width, 2, stride=2), nn.ReLU(inplace=True))
        self.block_two = nn.Sequential(conv(width, width, 3, padding=1), norm(width), nn.ReLU(inplace=True))
        self.dropout = nn.Dropout(0.5) if has_dropout else nn.Identity()
        self.out_conv = conv(width, classes, 1, padding=0)

    def body(self, x):
        skip = self.block_one(x)
        return self.dropout(self.block_two(self.block_one_up(self.block_one_dw(skip)) + skip))

    def forward(self, x):
        return self.out_conv(self.body(x))


class WithFeatures(Plain):
    """Returns its features beside the logits."""

    def forward(self, x):
        features = self.body(x)
        return self.out_conv(features), features


class TwoDecoders(nn.Module):
    """One encoder, two heads: a list of logits, as mutual consistency networks return."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(1, 6, 3, padding=1)
        self.heads = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 5 + k, 3, padding=1), nn.Conv2d(5 + k, 2, 1)) for k in range(2))

    def forward(self, x):
        e = self.encoder(x).relu()
        return [head(e) for head in self.heads]


class SharedHead(nn.Module):
    """One classifier that reads two decoders."""

    def __init__(self):
        super().__init__()
        self.decoders = nn.ModuleList(nn.Conv2d(1, 5, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return tuple(self.out(decoder(x)) for decoder in self.decoders)


class DeepSupervision(nn.Module):
    """nnU-Net's way: a list from fine to coarse in training, the finest alone in evaluation."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 7, 3, padding=1), nn.Conv2d(7, 9, 2, stride=2)
        self.seg_layers = nn.ModuleList([nn.Conv2d(9, 2, 1), nn.Conv2d(7, 2, 1)])

    def forward(self, x):
        fine = self.fine(x).relu()
        outputs = [self.seg_layers[1](fine), self.seg_layers[0](self.coarse(fine))]
        return outputs if self.training else outputs[0]


class Interpolated(nn.Module):
    """DeepLab's way: logits at a quarter of the resolution, interpolated."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 6, 4, stride=4)
        self.classifier = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return {"out": nn.functional.interpolate(self.classifier(self.body(x)), size=x.shape[2:], mode="bilinear")}


class Checkpointed(Plain):
    """The whole body, and the last layer with it, computed again in the backward pass."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
