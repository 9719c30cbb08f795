"""Numbers and names as the report prints them."""

from __future__ import annotations

from collections.abc import Sequence

from spray.report.data import Artifact, ModelResult, Recheck, Share

NOT_KNOWN = "–"

_MODELS = {
    "original": "Original model",
    "fine_tune": "Plain fine-tuning",
    "fine_tuned": "Plain fine-tuning",
    "a_clarc": "A-ClArC",
    "p_clarc": "P-ClArC",
    "a_clarc_latent": "A-ClArC (latent)",
    "reactive_p_clarc": "Reactive P-ClArC",
    "rr_clarc": "RR-ClArC",
    "rrr": "RRR",
    "dfr": "DFR",
    "group_balanced": "Group-balanced training",
    "lrp_guided": "LRP-guided training",
    "never_poisoned": "Trained on clean data",
    "ceiling": "Trained on clean data",
}
_ROLES = {
    "original": "the model under study",
    "fine_tune": "control: same budget, no correction",
    "fine_tuned": "control: same budget, no correction",
    "never_poisoned": "the best that can be hoped for",
    "ceiling": "the best that can be hoped for",
}
LABELS = {
    "constant_content": "the same content on all samples",
    "mask_share": "share of the image in the mask",
    "effect_interval": "difference of the rates",
    "elsewhere_flip_rate": "share turned when it is put elsewhere",
    "removal_cost_elsewhere": "loss of the logit when as much is removed elsewhere",
    "n_removed": "samples that it was removed from",
    "removal_held_out": "these are test images",
    "removal_gain_p_value": "p-value of a gain when it is removed",
    "score_threshold": "score from which on an image has it",
    "sample_bias": "as a kind of sample",
    "explanations": "Ways of cutting it out that were tried",
    "told_apart": "how well a classifier tells its samples from the rest of their class (1: always, 0.5: not at all)",
    "still_told_apart": "how well from the rest with the artifact added",
}
"""What further facts are called, by their key."""

_STATUSES = {
    "failed": "failed",
    "running": "was cut short",
    "pending": "was not reached",
    "stale": "is out of date",
    "not asked": "was not asked for",
}
VERDICTS = {
    "backdoor": "backdoor",
    "clever_hans": "Clever Hans",
    "sample_bias": "sample bias",
    "no_effect": "no effect",
}
"""What verdicts are called, within a sentence."""

_MEANINGS = {
    "backdoor": "The artifact alone turns images of other classes into this class, whose own images do without it.",
    "clever_hans": "The artifact turns images of other classes into this class, more than a control patch does, and "
    "removing it costs the class's own images.",
    "sample_bias": "These samples are a kind of their own, on which the model is wrong far more often than on the "
    "rest of their class: training had too few of them, or they belong to another class.",
    "no_effect": "The candidate did not pass the causal test.",
}
_LEVEL, _FEW = 0.01, 0.05
"""From these p-values on an effect may be chance, and below this difference of rates it is small, as in the test."""

PROVENANCE = {
    "spray_version": "spray",
    "git_sha": "Git commit",
    "seed": "Seed",
    "device": "Device",
    "config_hash": "Configuration, SHA-256",
}
"""What pages tell of run.json, by its key."""


def percent(share: Share | float | None, digits: int = 1) -> str:
    """Return a share as "83.2 %"."""
    value = share.value if isinstance(share, Share) else share
    return NOT_KNOWN if value is None else f"{100 * value:.{digits}f}\u202f%"


def interval(share: Share | None) -> str:
    """Return a share's 95 % interval as "81.0 – 85.1", empty if it is not known."""
    if share is None or share.low is None or share.high is None:
        return ""
    return f"{100 * share.low:.1f}\u2009–\u2009{100 * share.high:.1f}"


def p_value(value: float | None) -> str:
    """Return a p-value with the digits that mean something."""
    if value is None:
        return NOT_KNOWN
    if value < 0.001:
        return "<\u202f0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, integers with thin spaces between thousands."""
    if value is None:
        return NOT_KNOWN
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.{digits}g}".replace("-", "\u2212")


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return "1 sample", "3 samples"."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def duration(seconds: float | None) -> str:
    """Return a time as "42 s", "3 min 20 s", "2 h 5 min"."""
    if seconds is None:
        return NOT_KNOWN
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def model_name(name: str) -> str:
    """Return a model's name as the literature writes it."""
    if name.startswith("round_"):
        return f"After round {name.removeprefix('round_')}"
    return _MODELS.get(name, name)


def left_name(verdict: str) -> str:
    """Return what is left of an artifact in a corrected model, in words."""
    return {"gone": "gone", "no_effect": "still a cluster, without effect", "left": "still acts"}.get(verdict, verdict)


def model_role(name: str) -> str:
    """Return what a model is there for, empty where its name says it."""
    return _ROLES.get(name, "")


def left_sentence(rechecks: Sequence[Recheck], model: ModelResult | None = None) -> str:
    """Return what the artifacts still do in the corrected model, in a sentence; empty where none was looked at.

    That none passes the tests any more is not said to be nothing where the model is clearly less often right with them:
    where the 95 % intervals of its accuracies, clean and attacked, don't meet.
    """
    if not rechecks:
        return ""
    gone, acting = ([row for row in rechecks if row.verdict == verdict] for verdict in ("gone", "left"))
    groups = [row for row in rechecks if row.verdict == "no_effect"]
    if acting:
        head = f"{_listed(acting)} still {'acts' if len(acting) == 1 else 'act'} on the corrected model"
        if len(acting) == len(rechecks):
            return head + "."
        rest = "the other does not" if len(rechecks) - len(acting) == 1 else "the others do not"
        return f"{head}; {rest}."
    nothing = "Nothing that was found acts on the corrected model any more"
    if model is not None and _loses(model):
        nothing = (
            "Nothing passes the test in the corrected model any more, but it still loses accuracy to what was found"
        )
    if len(gone) == len(rechecks):
        return f"{nothing}; no cluster of its samples stands out."
    if len(groups) == len(rechecks) - len(gone):
        # Which is no contradiction: what samples share can tell them apart without deciding anything.
        return f"{nothing}, though the samples of {_listed(groups)} still form a cluster there."
    return "What is left of each artifact in the corrected model is listed below."


def _loses(model: ModelResult) -> bool:
    if model.clean is None or model.attacked is None or model.clean.low is None or model.attacked.high is None:
        return False
    return model.attacked.high < model.clean.low


def _listed(rows: Sequence[Recheck], most: int = 6) -> str:
    names = [row.artifact for row in rows]
    if len(names) > most:
        names = [*names[:most], f"{number(len(names) - most)} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def why_rejected(artifact: Artifact) -> str:
    """Return why a candidate is no finding, from what the causal test measured; empty where that isn't known."""
    rate, control = artifact.flip_rate, artifact.control_flip_rate
    if artifact.p_value is None or rate is None or control is None:
        return ""
    if artifact.p_value >= _LEVEL or rate <= control:
        return "moves predictions no more than its control"
    if artifact.unusual is False:
        return "its samples are an ordinary kind of image"
    if rate - control < _FEW:
        return "moves few predictions more than its control"
    if (artifact.removal_p_value or 0.0) >= _LEVEL:
        return "moves predictions, but the class's own images do without it"
    return "moves predictions, but is not all that sets its samples apart"


def verdict_name(verdict: str) -> str:
    """Return a verdict in words, as a heading."""
    name = VERDICTS.get(verdict)
    return verdict if name is None else name[:1].upper() + name[1:]


def verdict_meaning(verdict: str) -> str:
    """Return what a verdict says, in one sentence."""
    return _MEANINGS.get(verdict, "")


def status_name(status: str) -> str:
    """Return what became of a stage, in words."""
    return _STATUSES.get(status, status)


def one_line(text: str) -> str:
    """Return text for a window's title: no line breaks, no characters that change its direction."""
    hidden = {0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    return " ".join("".join(char for char in text if ord(char) not in hidden).split())


def clipped(text: str, most: int = 90) -> str:
    """Return text with its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 1]}…{text[len(text) - tail :]}"


def size(n_bytes: int) -> str:
    """Return a file's size as "3.4 MB"."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f}\u202f{unit}" if unit == "B" or value >= 100 else f"{value:.1f}\u202f{unit}"
        value /= 1000
    raise AssertionError
