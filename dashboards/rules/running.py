"""Rules on what ran and how: memory, hours, epochs, and what the text says of the code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dashboards.claim import Case, Judgement, OfAuthors, Rule, share_of_folds
from dashboards.evidence import SIX, Evidence, Ran, Runs, Variant
from dashboards.text import count, listing, plural
from dashboards.unlike import SETTING_WORDS
from helix.protocol import SWITCHES
from helix.published import AUTHORS_TRAINING, GPU, GPU_BYTES, GPU_BYTES_SEEN
from helix.spec import TrainingSpec

#: Peak bytes of a process in one full training step of one clip of 30,000 tokens, fp32 on a CPU, six layers with the
#: attention that keeps no matrix of weights (BENCHMARKS.md, step).
STEP_BYTES = {("mamba", 30_000): 6.30e9, ("helix", 30_000): 6.04e9, ("attention", 30_000): 4.54e9}

#: Layers of attention and heads, by which the weights of attention are counted that the authors' code asks for.
ATTENTION_LAYERS = {"mamba": 0, "helix": 1, "attention": 6}
HEADS = 4

#: On what times count.
ONE_OF_THEIRS = f"on a GPU of the paper's kind ({GPU} or RTX 6000)"


@dataclass(frozen=True, kw_only=True)
class Trains(Rule):
    """`backbone` on `tokens` tokens: "trains", is "slow" (over twice pure Mamba's time) or runs out of memory.

    All of it is said of a GPU of 48 GB. A run that ended shows that it trains there if it ended on one, or if its
    recorded peak fits one; a run that ran out of memory shows that it does not if its device had as much.
    `path` "authors": as the authors' code computes attention, which keeps its weights; "any": however it is computed.
    """

    backbone: str
    tokens: int
    how: Literal["trains", "slow", "OOM"]
    path: Literal["any", "authors"] = "any"

    def judge(self, case: Case) -> Judgement:
        ran = [
            runs
            for runs in case.evidence.cells.values()
            if (runs.tokens, runs.backbone, runs.other_size) == (self.tokens, self.backbone, False)
        ]
        done = [runs for runs in ran if any(runs.accuracy.values())]
        if self.how == "slow":
            return self._slow(case.evidence, done)
        on_path = self.path == "any" or case.evidence.switches.get("attn_impl") == "weights"
        fits = [runs for runs in done if any(map(_fits, runs.ended))] if on_path else []
        if fits:
            first = next(one for one in fits[0].ended if _fits(one))
            on = f" ({first.told})" if not case.evidence.published else ""
            told = f"it ran on {listing([runs.dataset for runs in fits])}{on}"
            return Judgement(verdict="contradicted" if self.how == "OOM" else "supported", because=told)
        if not case.evidence.published:
            return self._unfitting(ran, done if on_path else [], elsewhere=bool(done) and not on_path)
        step = STEP_BYTES.get((self.backbone, self.tokens))
        weights = ATTENTION_LAYERS[self.backbone] * HEADS * self.tokens**2 * 4
        if self.how == "OOM" and self.path == "authors" and weights > GPU_BYTES:
            told = f"the weights of attention that the authors' code asks for take {weights / 1e9:.0f} GB for one clip"
            return Judgement(verdict="supported", because=told)
        if step is not None and self.how == "OOM" and step < GPU_BYTES:
            return Judgement(
                verdict="contradicted",
                because=f"one training step of one clip takes {step / 1e9:.2f} GB where no weights are kept "
                f"(BENCHMARKS.md, fp32 on a CPU); the weights of attention that the authors' code asks for take "
                f"{weights / 1e9:.0f} GB",
            )
        return Judgement(verdict="no data", because=f"no run of {self.backbone} on {count(self.tokens)} raw tokens")

    def _unfitting(self, cells: Sequence[Runs], done: Sequence[Runs], *, elsewhere: bool) -> Judgement:
        """The judgement where no run is known to have ended within the memory that the claim is about.

        `elsewhere`: some ended that compute attention in another way.
        """
        failed = [ran for runs in cells for ran in runs.out_of_memory]
        enough = [ran for ran in failed if ran.device_bytes is not None and ran.device_bytes >= GPU_BYTES_SEEN]
        if enough and not done and not elsewhere:
            verdict = "supported" if self.how == "OOM" else "contradicted"
            return Judgement(verdict=verdict, because=f"it ran out of memory ({enough[0].told})")
        limit = f"{GPU_BYTES / 1e9:.0f} GB"
        seen = list(dict.fromkeys(ran.told for runs in done for ran in runs.ended or (Ran(),)))
        if done:
            why = f"it ran ({listing(seen)}), which does not show that it fits {limit}"
        elif failed and not elsewhere:
            seen = list(dict.fromkeys(ran.told for ran in failed))
            why = f"it ran out of memory ({listing(seen)}), which does not show that {limit} are too few"
        else:
            why = f"no finished run of {self.backbone} on {count(self.tokens)} raw tokens"
            why += " as the authors' code computes attention" if elsewhere else ""
        return Judgement(verdict="no data", because=why)

    def _slow(self, evidence: Evidence, done: Sequence[Runs]) -> Judgement:
        for runs in done:
            mamba = evidence.runs(runs.dataset, (runs.frontend, "mamba"))
            if runs.hours and mamba is not None and mamba.hours:
                times = runs.hours / mamba.hours
                told = f"{times:.1f} times the time of pure Mamba on {runs.dataset}"
                if less := [*dict.fromkeys((*runs.less, *mamba.less))]:
                    return Judgement(verdict="no data", because=f"{told}, by no runs like the paper's: {listing(less)}")
                ran = [ran for side in (runs, mamba) for ran in side.ended or (Ran(),)]
                on = list(dict.fromkeys(one.on for one in ran))
                if len(on) > 1:
                    return Judgement(verdict="no data", because=f"{told}, on {listing(on)}, which are not one device")
                if not all(one.like_the_papers for one in ran):
                    return Judgement(verdict="no data", because=f"{told}, on {listing(on)} and not {ONE_OF_THEIRS}")
                return Judgement(verdict="supported" if times > 2 else "contradicted", because=told)
        return Judgement(
            verdict="no data", because=f"no times of {self.backbone} and mamba on {count(self.tokens)} tokens"
        )


def _fits(ran: Ran) -> bool:
    """Whether a run is known to have needed no more memory than a GPU of 48 GB has."""
    # A process holds on a GPU more than its tensors, whose peak this is: it has to fit what is seen of one. What one
    # held in the memory of a machine is no measure of it.
    within = ran.on_gpu and ran.peak_bytes is not None and ran.peak_bytes < GPU_BYTES_SEEN
    return within or (ran.device_bytes is not None and ran.device_bytes <= GPU_BYTES)


@dataclass(frozen=True, kw_only=True)
class Takes(Rule):
    """All folds of each variant of `dataset` take at most `hours`; or, with `tolerance`, that share about them.

    Said of the GPUs of the paper, so that hours on anything else are told and not judged.
    """

    dataset: str
    hours: float
    tolerance: float | None = None

    def judge(self, case: Case) -> Judgement:
        counts = case.evidence.counts.get(self.dataset)
        folds = counts.folds if counts else 1
        known = [
            (runs.hours * folds, runs)
            for runs in case.evidence.cells.values()
            if runs.dataset == self.dataset
            and runs.hours
            and (runs.frontend, runs.backbone) in SIX
            and not (runs.other_course or runs.other_practice)
        ]
        if not known:
            others = [runs for runs in case.evidence.cells.values() if runs.dataset == self.dataset and runs.hours]
            reasons = dict.fromkeys(phrase for runs in others for phrase in (*runs.less, *runs.unlike))
            course = listing(list(reasons)) or "other epochs"
            return Judgement(
                verdict="no data",
                because=f"no times of {self.dataset} are known"
                + (f" of runs like the paper's: those here have {course}" if others else ""),
            )
        other = [ran.on for _, runs in known for ran in runs.ended or (Ran(),) if not ran.like_the_papers]
        took = [hours for hours, _ in known]
        told = f"{min(took):.3g} to {max(took):.3g} hours" if len(took) > 1 else f"{took[0]:.3g} hours"
        told += f" for {plural(folds, 'fold')}"
        epochs = {runs.epochs for _, runs in known}
        told += f", {count(known[0][1].epochs)} epochs" if len(epochs) == 1 and None not in epochs else ""
        if other:
            on = listing(list(dict.fromkeys(other)))
            why = f"{told}, on {on} and not {ONE_OF_THEIRS}"
            return Judgement(verdict="no data", because=why)
        fewest = min(len({fold for given in runs.accuracy.values() for fold, _ in given}) for _, runs in known)
        share = share_of_folds(case.evidence, self.dataset, fewest)
        if share:
            return Judgement(verdict="underpowered", because=f"{told}, by the time of {share}")
        right = max(took) <= self.hours
        if self.tolerance is not None:
            right = all(abs(one / self.hours - 1) <= self.tolerance for one in took)
        if right and len(known) < len(SIX):  # the others may have taken any time
            return Judgement(verdict="underpowered", because=f"{told}, by {len(known)} of {len(SIX)} variants")
        return Judgement(verdict="supported" if right else "contradicted", because=told)


@dataclass(frozen=True, kw_only=True)
class Epochs(OfAuthors):
    """Every one of the cells stopped before `before` epochs, or (`at`) trained exactly so many.

    With neither, it is published how many each of them trained.
    """

    of: tuple[tuple[str, Variant], ...]
    before: int | None = None
    at: int | None = None

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return self.of

    def published(self, evidence: Evidence) -> Judgement:
        known = epochs_of(evidence, self.of)
        absent = [name for name, epochs in known.items() if epochs is None]
        told = "epochs: " + ", ".join(f"{name} {epochs}" for name, epochs in known.items() if epochs)
        if absent:
            why = f"the epochs of {listing(absent)} are not published"
            return Judgement(verdict="no data", because=why + (f"; {told}" if len(absent) < len(known) else ""))
        wrong = [
            name
            for name, epochs in known.items()
            if epochs is not None
            and ((self.before is not None and epochs >= self.before) or (self.at is not None and epochs != self.at))
        ]
        return Judgement(verdict="contradicted" if wrong else "supported", because=told)


@dataclass(frozen=True, kw_only=True)
class FewerEpochs(OfAuthors):
    """`first` trained fewer epochs than each of the `others` of that data set."""

    dataset: str
    first: Variant
    others: tuple[Variant, ...]

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return tuple((self.dataset, variant) for variant in (self.first, *self.others))

    def published(self, evidence: Evidence) -> Judgement:
        known = {name: epochs for name, epochs in epochs_of(evidence, self.cells).items() if epochs is not None}
        if len(known) < len(self.cells):
            return Judgement(verdict="no data", because="the epochs of these runs are not published")
        first, *others = known.values()
        told = "epochs: " + ", ".join(f"{name} {epochs}" for name, epochs in known.items())
        return Judgement(verdict="supported" if first < min(others) else "contradicted", because=told)


@dataclass(frozen=True, kw_only=True)
class RanOn(OfAuthors):
    """What was published ran on this kind of GPU."""

    gpu: str

    def published(self, evidence: Evidence) -> Judgement:
        if not evidence.gpu:
            return Judgement(verdict="no data", because="no other source names the GPU")
        verdict = "supported" if evidence.gpu == self.gpu else "contradicted"
        return Judgement(verdict=verdict, because=f"the authors' README has its runs on one {evidence.gpu}")


@dataclass(frozen=True)
class SameAsPaper(OfAuthors):
    """The authors' code sets these switches of helix/protocol.py, and these numbers, as the paper's text has them."""

    switches: tuple[str, ...]
    numbers: tuple[str, ...] = ()

    def published(self, evidence: Evidence) -> Judgement:
        other = [name for name in self.switches if evidence.switches[name] != SWITCHES[name]["paper"]]
        text = TrainingSpec()
        wrong = [name for name in self.numbers if AUTHORS_TRAINING[name] != getattr(text, name)]
        if other or wrong:
            told = [f"{name}: the code does: {SWITCHES[name]['does']}" for name in other]
            told += [f"the code has {SETTING_WORDS[name]} {AUTHORS_TRAINING[name]:g}" for name in wrong]
            return Judgement(verdict="contradicted", because="; ".join(told))
        same = [*self.switches, *(f"{SETTING_WORDS[name]} ({AUTHORS_TRAINING[name]:g})" for name in self.numbers)]
        return Judgement(verdict="supported", because=f"the authors' code does as the text says in {listing(same)}")


def epochs_of(evidence: Evidence, cells: Sequence[tuple[str, Variant]]) -> dict[str, int | None]:
    """What each cell trained, None where that is not known; by its name, with the data set where there are several."""
    several = len({dataset for dataset, _ in cells}) > 1
    return {
        f"{backbone} {frontend}{f' on {dataset}' if several else ''}": runs.epochs if runs is not None else None
        for dataset, (frontend, backbone) in cells
        for runs in (evidence.runs(dataset, (frontend, backbone)),)
    }
