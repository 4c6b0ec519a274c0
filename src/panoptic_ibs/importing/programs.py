"""Names of programs whose checkpoints are not converted, by a tensor that only they have."""

from __future__ import annotations

import re
from collections.abc import Iterable

# From the more to the less particular: several have all of a simpler program's names and some of their own.
OTHERS: list[tuple[str, str]] = [
    ("OneFormer", r"(?:task_mlp|text_projector|prompt_ctx|text_encoder)\..*"),
    ("OneFormer (transformers)", r"model\.(?:task_encoder|text_mapper)\..*"),
    ("kMaX-DeepLab", r"sem_seg_head\.predictor\._(?:kmax|class_embedding|mask_embedding|transformer_mask).*"),
    ("Mask DINO", r"sem_seg_head\.predictor\.(?:_?bbox_embed|label_enc|enc_output|ref_point_head)\b.*"),
    ("FC-CLIP", r"sem_seg_head\.predictor\._?(?:mask_pooling|void_embedding).*"),
    ("MaskFormer (detectron2)", r"sem_seg_head\.predictor\.transformer\..*"),
    ("MaskFormer (transformers)", r"model\.pixel_level_module\.decoder\.fpn\..*"),
    ("EoMT (transformers)", r"upscale_block\.block\.\d+\..*"),
    ("EoMT", r"network\.(?:q|upscale|mask_head|class_head)\..*"),
    ("a DETR of panoptic segmentation (transformers)", r"detr\.model\..*"),
    ("a DETR of panoptic segmentation", r"detr\.(?:transformer|bbox_embed)\..*"),
    ("a DETR (transformers)", r"model\.decoder\.(?:bbox_embed|class_embed)\..*|bbox_predictor\.layers\..*"),
    ("a DETR", r"(?:transformer\.)?(?:bbox_embed|class_embed)\..*|transformer\.level_embed"),
    ("a Mask2Former or MaskFormer of mmdetection", r"panoptic_head\..*"),
    ("a network of mmsegmentation, or SegFormer", r"decode_head\..*"),
    ("Panoptic-DeepLab", r"ins_embed_head\..*"),
    ("a network with other proposals (detectron2)", r"proposal_generator\.(?!(?:rpn_head|anchor_generator)\.).*"),
    ("Segment Anything", r"(?:mask_decoder|prompt_encoder|sam_mask_decoder)\..*"),
    ("a YOLO", r"model\.\d+\.(?:cv\d|m|dfl)\..*"),
    ("a backbone alone (give it as backbone.weights=FILE)", r"(?:stem\.conv1|conv1|patch_embed\.proj)\.weight|conv1_w"),
]  # fmt: skip


def program_of(names: Iterable[str]) -> str | None:
    """What tensors of these names belong to, in words; None when it is not known."""
    names = list(names)
    return next((program for program, sign in OTHERS if any(re.fullmatch(sign, name) for name in names)), None)
