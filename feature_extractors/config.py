"""Tables of methods and protocols, and the settings of a detector."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from reprlib import repr as shortened
from typing import ClassVar, NamedTuple

from utils.choices import POINT_NORMS, POINT_OPS, PRECISIONS
from utils.errors import Bounds, InputError, range_problem

BANKS = ("xyz", "rgb", "fusion")  # also the order of scores and maps in decision fusion
MEMORY_BANKS = ("single", "multiple")


class Method(NamedTuple):
    """One value of --method_name."""

    banks: tuple[str, ...]  # in the order of BANKS
    fusion: str = "none"  # decision fusion: "none", "sum" or "svm"
    statistics: str = "none"  # reference protocol: "none", "own", or "shared" (mean of xyz, std of rgb)
    score_divisor: float = 1.0  # reference protocol: distances are divided by it before the image score
    weight_epsilon: float = 0.0  # added to the sum of exponentials in the image score
    zero_row: bool = False  # reference protocol: append a zero row to the xyz bank

    @property
    def modalities(self) -> frozenset[str]:
        """Modalities of the files and backbones that the method needs."""
        return frozenset({"rgb", "xyz"} if "fusion" in self.banks else self.banks)

    @property
    def memory_bank(self) -> str:
        """The only value of --memory_bank that fits the method."""
        return "multiple" if len(self.banks) > 1 else "single"


METHODS = {
    "DINO": Method(("rgb",), statistics="own", weight_epsilon=1e-5),
    "Point_MAE": Method(("xyz",), weight_epsilon=1e-5),
    "Fusion": Method(("fusion",)),
    "DINO+Point_MAE": Method(("xyz", "rgb"), "svm", "shared", score_divisor=1000.0),
    "DINO+Point_MAE+add": Method(("xyz", "rgb"), "sum", "shared"),
    "DINO+Point_MAE+Fusion": Method(("xyz", "rgb", "fusion"), "svm", "shared", zero_row=True),
}


def covering_method(names: Iterable[str]) -> str:
    """The smallest method whose banks cover those of every named method; a named one wins a tie."""
    named = list(names)
    wanted = {bank for name in named for bank in METHODS[name].banks}
    covering = [name for name, method in METHODS.items() if wanted <= set(method.banks)]
    return min(covering, key=lambda name: (len(METHODS[name].banks), name not in named))


@dataclass(frozen=True)
class Protocol:
    """Changes to the published computation. False: as published; True: changed."""

    # Corrections
    own_statistics: bool = False  # mean and std of each bank, instead of the method's rule
    own_coreset_size: bool = False  # f_coreset of each bank's own size, instead of the size of the xyz coreset
    drop_background: bool = False  # xyz bank with a single background row
    unscaled_scores: bool = False  # ignore the method's score_divisor
    float_blur: bool = False  # Gaussian in floats, instead of through an 8-bit image
    exact_distances: bool = False  # by direct differences, instead of expanded fp32 squares, which lose digits
    masked_pooling: bool = False  # pad the border and average valid pixels only, instead of plain pooling
    exact_au_pro: bool = False  # headline AU-PRO from the exact curve, instead of 100 thresholds
    # Extensions
    foreground: bool = False  # where there is a cloud, only patches near a point enter the banks and the map
    local_spacing: bool = False  # distances in the map relative to the spacing of the nearby rows of the bank
    noise_units: bool = False  # largest of the banks, in units of their noise on good samples, instead of SVMs
    top_score: bool = False  # image score: mean of the highest pixels, instead of PatchCore's weighted patch


EXTENSIONS = ("foreground", "local_spacing", "noise_units", "top_score")
PROTOCOLS = {
    "reference": Protocol(),
    "corrected": Protocol(**{each.name: each.name not in EXTENSIONS for each in fields(Protocol)}),
    "extended": Protocol(**{each.name: True for each in fields(Protocol)}),
}


@dataclass(frozen=True)
class DetectorConfig:
    """All settings of a detector's computation. The defaults are the reference's.

    Raises:
        InputError: a value is out of its range, or a combination makes no sense.
    """

    BOUNDS: ClassVar[Bounds] = {  # of numeric flags
        **{"img_size": (3, 2048), "group_size": (1, 1024), "num_group": (3, 8192)},  # points are interpolated from 3
        **{"f_coreset": (1e-6, 1.0), "coreset_eps": (0.001, 0.999), "random_state": (0, 2**32 - 1)},
        **{"asy_memory_bank": (1, 10**6), "ocsvm_nu": (1e-4, 1.0), "ocsvm_maxiter": (1, 10**6)},
        **dict.fromkeys((f"{bank}_{kind}_lambda" for kind in ("s", "smap") for bank in BANKS), (-(10**6), 10**6)),
    }

    method_name: str = "DINO+Point_MAE+Fusion"
    memory_bank: str | None = None  # None: the one that the method needs
    rgb_backbone_name: str = "vit_base_patch8_224_dino"
    rgb_layers: tuple[int, ...] | None = None  # ascending; None: the network's default, see models.rgb_backbone
    xyz_backbone_name: str = "Point_MAE"
    use_uff: bool = False
    protocol: Protocol = field(default_factory=Protocol)
    point_norm: str = "cloud"
    point_ops: str = "auto"
    precision: str = "fp32"
    img_size: int = 224
    xyz_grid: int = 56  # patches along a side of the xyz and fusion banks; the paper's 56x56 = 3136
    group_size: int = 128
    num_group: int = 1024
    f_coreset: float = 0.1
    coreset_eps: float = 0.9
    random_state: int | None = None
    asy_memory_bank: int | None = None  # xyz and fusion banks from the first N samples only
    rm_zero_for_project: bool = False
    ocsvm_nu: float = 0.5
    ocsvm_maxiter: int = 1000
    score_lambdas: tuple[float, float, float] = (1.0, 0.1, 1.0)  # xyz, rgb, fusion
    map_lambdas: tuple[float, float, float] = (1.0, 0.1, 1.0)

    @property
    def method(self) -> Method:
        """Row of METHODS."""
        return METHODS[self.method_name]

    @property
    def backbone_names(self) -> dict[str, str]:
        """Backbone names that the method needs, by modality, sorted."""
        names = {"rgb": self.rgb_backbone_name, "xyz": self.xyz_backbone_name}
        return {modality: names[modality] for modality in sorted(self.method.modalities)}

    @property
    def drops_background(self) -> bool:
        """True if the xyz bank is built without background patches, and one background row is appended."""
        return self.protocol.drop_background or self.rm_zero_for_project

    @property
    def has_foreground(self) -> bool:
        """True if patches far from the cloud are left out of all banks and of the map."""
        return self.protocol.foreground and "xyz" in self.method.modalities

    @property
    def decision_fusion(self) -> str:
        """Fusion of several banks: "none" (a single bank), "sum", "svm", or "noise" (largest, in units of noise)."""
        several = len(self.method.banks) > 1
        return "noise" if self.protocol.noise_units and several else self.method.fusion

    def samples_of(self, bank: str) -> int | None:
        """Number of training samples of a bank, None for all."""
        return None if bank == "rgb" else self.asy_memory_bank

    @property
    def lambdas_of_banks(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Factors of scores and factors of maps, in the order of the method's banks; 1 for "noise"."""
        if self.decision_fusion == "noise":
            return ((1.0,) * len(self.method.banks),) * 2
        places = [BANKS.index(name) for name in self.method.banks]
        return tuple(self.score_lambdas[k] for k in places), tuple(self.map_lambdas[k] for k in places)

    def __post_init__(self) -> None:
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        choices: dict[str, Collection[str]] = {"method_name": METHODS, "precision": PRECISIONS}
        choices |= {"point_norm": POINT_NORMS, "point_ops": POINT_OPS}
        if self.memory_bank is not None:
            choices["memory_bank"] = MEMORY_BANKS
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name} is {shortened(getattr(self, name))}. Give one of {', '.join(allowed)}.")
        for name, (low, high) in self.BOUNDS.items():
            value = getattr(self, name, None)  # the weights of scores and maps are tuples here
            if value is not None and (problem := range_problem(value, low, high)):
                raise InputError(f"--{name} {problem}")
        layers = self.rgb_layers or (0,)
        if list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise InputError(f"--rgb_layers is {' '.join(map(str, layers))}. Give ascending numbers from 0.")
        least = self.xyz_grid + 2  # pooling without padding loses two pixels
        if self.xyz_grid < 1 or self.img_size < least:
            problem = f"Give at least {least} for {self.xyz_grid} xyz patches a side"
            raise InputError(f"--img_size is {self.img_size}. {problem}.")

    def _check_combinations(self) -> None:
        method, name = self.method, self.method_name
        if self.memory_bank not in (None, method.memory_bank):
            raise InputError(
                f"--memory_bank {self.memory_bank} does not fit the banks of {name} ({', '.join(method.banks)}). "
                f"Use --memory_bank {method.memory_bank} instead of {self.memory_bank}."
            )
        if self.use_uff and "fusion" not in method.banks:
            raise InputError(f"--use_uff has no effect on {name}, which has no fusion bank. Remove it or use Fusion.")
        if self.rm_zero_for_project and method.banks != ("xyz",):
            raise InputError(f"--rm_zero_for_project is for the single xyz bank (Point_MAE), not {name}. Remove it.")
        if self.asy_memory_bank is not None and len(method.banks) == 1:
            raise InputError(f"--asy_memory_bank needs several memory banks, but {name} has one. Use --max_sample.")
