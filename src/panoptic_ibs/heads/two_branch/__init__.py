"""Networks of two branches, instances by boxes and semantic segmentation, composed of the parts in this package.

Panoptic FPN is the baseline; UPSNet joins the branches by a panoptic head. Parts: :mod:`.proposals`, :mod:`.matching`,
:mod:`.regions`, :mod:`.network` and :mod:`.instances` (boxes and masks), :mod:`.semantic`, :mod:`.deformable`,
:mod:`.combination`, :mod:`.unified`; :mod:`.base` holds what heads share.
"""

from .base import TwoBranchHead, TwoBranchOutput
from .panoptic_fpn import PanopticFPN
from .upsnet import UPSNet

__all__ = ["PanopticFPN", "TwoBranchHead", "TwoBranchOutput", "UPSNet"]
