"""Values of flags that several layers share. Importing them does not import torch."""

PRECISIONS = ("fp32", "bf16", "auto")  # of the networks
STORAGE_DTYPE_NAMES = ("fp16", "fp32")  # of features and memory banks, in memory and in files
POINT_NORMS = ("cloud", "running")  # BatchNorm statistics of the group encoder: current cloud, or checkpoint
POINT_OPS = ("auto", "torch", "triton", "extension")  # backends of the point searches
PAIRINGS = ("aligned", "reference")  # of rgb and xyz patches in UFF training
CLEANING_FLAGS = {  # fields of CleaningRule, with the help of their flags
    "keep_rgb": "keep the background of the images; only pad them",
    "mask_unmeasured": "blacken image pixels without a measurement; by default they keep their color",
    "empty_margins": "look for the table along the border of the measured area, not of the image",
}
UNITS = {"m": 1.0, "mm": 0.001, "cm": 0.01}  # of coordinates, meters
MAX_MEGAPIXELS = 64  # of an image, unless --max_megapixels says otherwise
NEGATIVES = ("local", "global")  # of the contrastive loss: rows of this process, or of all
