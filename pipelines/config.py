"""The configuration's schema: every key, its type and its default. The shipped values are in `conf/`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spray.data.plant_defaults import DEFAULTS
from spray.pipelines.stages import NAMES


@dataclass
class DatasetConfig:
    """Which images, and what is planted in the training images."""

    name: str = "photos"
    train: str | None = None
    test: str | None = None
    image_size: int | None = None
    # FILE.py:FUNCTION of the user's own, which returns training and test data (dataset=factory).
    factory: str | None = None
    # What else the kind of dataset takes: a mapping.
    options: Any = None
    # Whether every image file is decoded once, to leave out those that can't be, before anything starts.
    check: bool = True
    # At most so many images of each class, in training and in test: for trying things out.
    per_class: int | None = None
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.5])
    # A mapping, not a dataclass: one of its keys is `class`, and kinds of artifacts may bring their own.
    plant: dict[str, Any] = field(default_factory=lambda: {**DEFAULTS, "kind": "none"})
    # More of them, planted one after the other: mappings with the same keys.
    plants: list[Any] = field(default_factory=list)


@dataclass
class ModelConfig:
    """The classifier under study and, where it has no checkpoint, its training."""

    name: str = "small_cnn"
    factory: str | None = None
    checkpoint: str | None = None
    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.0


@dataclass
class AttributionConfig:
    """How relevance is computed, and for which output."""

    method: str = "lrp"
    # For LRP: the name of a composite, or a mapping from layers to rules.
    composite: Any = "epsilon_plus_flat"
    # The method's own options, as keyword arguments of `spray.explain`: a mapping. (Not typed as one, so that
    # the command line may set it without a plus sign.)
    options: Any = None
    # For LRP: inner layers (a name or a list) whose relevance, summed over positions, is stored beside that of
    # the input. For Grad-CAM: the layer that it looks at; by default the last that has feature maps.
    layer: Any = None
    # `label`, `prediction` or a class index.
    target: str = "label"
    # What is stored of each heatmap: `all` channels or their `sum`; averaged down to `pool` x `pool` if given.
    channels: str = "all"
    pool: int | None = None
    dtype: str = "float32"
    # A number of images, or `auto`.
    batch_size: Any = 64
    # The run stops when more than this share of the samples can't be explained.
    max_bad: float = 0.01


@dataclass
class ComputeConfig:
    """Where the work is done."""

    name: str = "serial"
    # Samples in a shard, the unit of work that survives an interruption; null: about 64 MB, at most 512.
    shard_size: int | None = None
    # How heatmaps are compressed on disk: none or gzip.
    compression: str = "none"
    # Batches read ahead.
    prefetch: int = 4
    # Threads for arithmetic in each process; null: all cores, shared out among the workers of this machine.
    threads: int | None = None
    # Dask: number of workers; null: one for each GPU, or for each two cores.
    n_workers: int | None = None
    # Address of Dask's dashboard.
    dashboard: str = "127.0.0.1:0"
    # For dask_slurm: what dask_jobqueue.SLURMCluster takes.
    slurm: dict[str, Any] = field(default_factory=dict)


@dataclass
class AnalysisConfig:
    """Spectral relevance analysis of groups of samples."""

    # What is analyzed: `attribution`, the heatmaps, or an inner layer that attribution.layer stores.
    source: str = "attribution"
    # What makes heatmaps comparable, in this order: names of steps, or {name: value}, {name: {option: value}}.
    steps: list[Any] = field(default_factory=lambda: ["sum", "pool", "normalize_sum"])
    # What the step `pool` averages larger heatmaps down to, unless it says so itself.
    grid: int = 16
    # How alike two samples are: euclidean or cosine; and how neighbours are searched: auto, exact, cells, pynndescent.
    metric: str = "euclidean"
    neighbors: str = "auto"
    n_neighbors: int = 10
    n_components: int = 32
    # Which samples are analyzed together: those of a `class`, those `predicted` as one, `all`.
    groups: list[str] = field(default_factory=lambda: ["class"])
    # kmeans and agglomerative for each of n_clusters, dbscan, hdbscan; with options as those of steps.
    clusterings: list[Any] = field(default_factory=lambda: ["kmeans"])
    n_clusters: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6, 7, 8])
    # Pictures of the embedding.
    umap: bool = True
    tsne: bool = False


@dataclass
class RankConfig:
    """How classes and clusters are scored."""

    # `cross_fitted`, or `fisher`: the tutorial's score, measured on the embedding itself and nothing else.
    score: str = "cross_fitted"
    # What else counts: repeated, content. Others made the ranking no better and are off: confidence, concentration,
    # stability (over the numbers of clusters), resampling (in parts of the samples), held_out (see below).
    evidence: list[str] = field(default_factory=lambda: ["repeated", "content"])
    # For held_out: an inner layer that attribution.layer stores, or the run_dir of a run with another
    # attribution.method on the same data, whose heatmaps had no part in the clusters.
    held_out: str = ""
    # How often clusters are sought again without a fifth of the samples; their ranking rows say how well they are
    # found. Less often for classes of more than 3,750 samples; 0: never.
    draws: int = 10
    # Further ways of comparing heatmaps in which clusters are sought: scaled, peak (see spray/analysis/views.py).
    views: list[str] = field(default_factory=lambda: ["scaled", "peak"])
    # Clusters of each class and view, the most separable ones, whose images are looked at.
    looked_at: int = 6
    # For the false discoveries among all classes and all clusters: benjamini_hochberg, benjamini_yekutieli.
    correction: str = "benjamini_hochberg"


@dataclass
class IsolateConfig:
    """How artifacts are cut out and put to the test."""

    # Most clusters looked at, of each class and altogether.
    per_class: int = 4
    candidates: int = 64
    # Most groups of each class that the model's inner activations show, whatever the heatmaps do; 0: none.
    latent: int = 4
    # Most samples that an artifact is isolated from, and most test images that it is added to.
    n_samples: int = 200
    n_tested: int = 500


@dataclass
class CorrectionConfig:
    """Which corrections are tried."""

    # The control `fine_tuned` is always made as well.
    methods: list[str] = field(default_factory=lambda: ["a_clarc", "p_clarc"])
    epochs: int = 2
    learning_rate: float = 5e-4
    # How often artifacts are sought and corrected at most, each time in the model that the time before gave.
    rounds: int = 1
    # Where latent methods work: auto, output (what the last layer is given) or a module's name; NAME:in is its input.
    layer: str = "auto"
    # How an artifact's direction is estimated: pattern, svm, logistic, ridge or lasso; of all activations (full) or of
    # channels, max-pooled over positions (max), or whichever does better (auto); and how many directions.
    cav: str = "pattern"
    pooling: str = "auto"
    directions: int = 1
    # auto, a number for all methods that have a strength, or a mapping such as {rr_clarc: 10}.
    strength: Any = "auto"
    # RR-ClArC's: cosine, or square as in the paper.
    penalty: str = "cosine"
    # Whether classes that have no images with the artifact get some made (dfr, group_balanced).
    fill_groups: bool = True
    # Share of the training images that layer and strength are chosen on, and the loss of clean accuracy allowed.
    validation: float = 0.2
    max_loss: float = 0.005


@dataclass
class VerifyConfig:
    """How models are compared."""

    # Attacked images of which the relevance is measured.
    n_explained: int = 500
    # Whether artifacts are sought once more in the best corrected model.
    recheck: bool = True
    # Whether a model is trained without what is planted, to compare with.
    ceiling: bool = False


@dataclass
class ReportConfig:
    """What the report shows."""

    # Formats of the figures for papers in `figures/`: png, pdf; an empty list for none.
    figures: list[str] = field(default_factory=lambda: ["png", "pdf"])


@dataclass
class CompareConfig:
    """With which other model this one is compared, when stage compare is asked for; one of the two."""

    # The run_dir of a run of another model on the same data.
    other: str | None = None
    # A correction of this run's model, such as a_clarc.
    correction: str | None = None


@dataclass
class SprayConfig:
    """The whole configuration."""

    seed: int = 0
    device: str = "auto"
    stages: list[str] = field(default_factory=lambda: list(NAMES))
    run_dir: str = "outputs"
    plan: bool = False
    # none, tensorboard or mlflow: for whom results are written once more.
    tracker: str = "none"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    isolate: IsolateConfig = field(default_factory=IsolateConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)


def typed_config(plain: Any) -> SprayConfig:
    """Return a plain, resolved configuration as the schema's dataclasses.

    Raises
    ------
    omegaconf.errors.OmegaConfBaseException
        For a key that the schema lacks, or a value of another type.
    """
    from omegaconf import OmegaConf

    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SprayConfig), plain))
    assert isinstance(typed, SprayConfig)
    return typed


def register_schema() -> None:
    """Tell Hydra the schema that `conf/config.yaml` builds on."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=SprayConfig)
