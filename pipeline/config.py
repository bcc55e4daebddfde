"""Options of the command lines. The docstring under a field is its help text."""

import math
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

from pipeline.data.prompts import TOKENS
from pipeline.errors import UserError

CRITERIA = (
    "wanda",
    "sparse",
    "contrastive-wanda",
    "contrastive-sparse",
    "target-shift",
    "magnitude",
    "random",
    "neutral",
    "first-order",
    "first-order-damage",
    "first-order-pool",
    "first-order-gate",
)
FIRST_ORDER = ("first-order", "first-order-damage", "first-order-pool", "first-order-gate")
WHITENED = "first-order"
"""The criterion whose answers count as their gradients say (``pipeline.whitening``)."""
SIGNED = ("target-shift", *FIRST_ORDER)
"""Criteria of ours: a sign says what may go, so a row may lose fewer weights than asked."""
CONTRASTIVE = ("contrastive-wanda", "contrastive-sparse", *SIGNED)
ACTIVATIONS = ("softplus", "relu")
READERS = {
    "activation": ("contrastive-wanda",),
    "temperature": ("contrastive-wanda",),
    "shift": ("target-shift",),
    "pool": ("first-order", "first-order-damage", "first-order-pool"),
    "evidence": (WHITENED,),
    "loops": (WHITENED,),
    "apart": (WHITENED,),
    "apart_yes_no": (WHITENED,),
}
"""By option of ``CalibrateConfig``, the criteria that read it, where not all do."""
CONDITIONS = ("prompt", "rag", "steering", "lora", "mask", "prompt+mask", "neutral", "base", "random", "rows", "others")
"""What ``pipeline.evaluate --conditions`` knows (``pipeline.conditions``)."""


@dataclass(frozen=True)
class Sparsity:
    """Share of weights removed: a default and overrides by part of the layer's name, exact decimals."""

    default: Decimal
    overrides: tuple[tuple[str, Decimal], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Sparsity":
        """``0.5``, or ``0.5,mlp=0.3,down_proj=0.2`` (the last match wins). Raises UserError outside [0, 1)."""
        default, overrides = None, []
        for part in str(text).split(","):
            name, equals, number = part.strip().rpartition("=")
            value = _share(number, f"--sparsity {text!r}")
            if equals and not name.strip():
                raise UserError(f"--sparsity {text!r}: a layer's name is missing before '='")
            if equals:
                overrides.append((name.strip(), value))
            elif default is not None:
                raise UserError(f"--sparsity {text!r}: more than one default")
            else:
                default = value
        return cls(Decimal(0) if default is None else default, tuple(overrides))

    def scaled(self, factor: Decimal) -> "Sparsity":
        """Every share times ``factor``, in [0, 1]."""
        return Sparsity(self.default * factor, tuple((name, value * factor) for name, value in self.overrides))

    def of(self, layer: str) -> Decimal:
        """The sparsity of a layer: the last override whose name is a part of the layer's dotted name."""
        chosen = self.default
        for name, value in self.overrides:
            if f".{name}." in f".{layer}.":
                chosen = value
        return chosen

    def keep(self, layer: str, columns: int) -> int:
        """``floor((1 - sparsity) K)``, eq. 4."""
        return int((1 - self.of(layer)) * columns)


@dataclass
class CalibrateConfig:
    """What to measure, how to score, where to write."""

    model: str = "smollm2"
    """Hugging Face id or local folder of a causal language model; "smollm2" is the embedded SmolLM2-135M-Instruct."""
    personas: str = "dichotomies"
    """Comma-separated: "dichotomies" (the four shipped sets), "types" (the sixteen Myers-Briggs types), a shipped
    set's name such as introvert-extravert, a type such as INTJ, "characters" (a pirate, a butler, a detective and a
    robot, each against the others) or one of them such as pirate, your own [PLUS[/MINUS]=]SOURCE, a CSV or JSON Lines
    file or a hub id, voices:FILE, where one question has an answer by each persona, or roleagentbench:FOLDER (or hub
    id)."""
    compose: str = ""
    """Comma-separated mixtures of measured personas, NAME[/OPPOSITE]=0.7*introvert+0.3*thinking; masks are then made
    for the mixtures (and types), not for their parts."""
    criterion: str = "first-order"
    """Ours, signed by one backward pass: first-order (gain per damage to neutral text among what surely helps), and
    its plainer forms first-order-damage, first-order-pool, first-order-gate; without a backward pass, target-shift
    (every output moves towards the persona's mean). The paper's: wanda, sparse, contrastive-wanda,
    contrastive-sparse. Controls: magnitude, random, neutral."""
    sparsity: str = "0.03"
    """Share of every row that is removed, in [0, 1), with overrides by layer: 0.5 or 0.5,mlp=0.3,down_proj=0.2. The
    first-order criteria work at 0.01 to 0.05 and remove at most so many; the paper's are meant for 0.2 to 0.6."""
    max_perplexity_increase: float | str | None = None
    """Remove, for each persona, as large a part of --sparsity as raises perplexity by at most this share, on text such
    as the unmasked model writes (exp of the divergence from it, on neutral answers) and on the persona's own answers; 0
    removes all of it whatever the cost. A number or a percentage: 0.05 or 5%. Default 15% for first-order, 0 for the
    other criteria."""
    activation: str = "softplus"
    """contrastive-wanda: phi of eq. 8, softplus or relu (relu leaves ties, which wanda's score breaks)."""
    temperature: float = 2.0
    """contrastive-wanda: tau of softplus(z / tau)."""
    pool: float = 0.3
    """First-order criteria but the gate: share of every row, the least important weights, to choose from."""
    shift: float = 1.0
    """target-shift: how far an output's mean moves, as a multiple of the poles' mean difference there; --sparsity
    bounds what a row may lose for it."""
    evidence: float = 1.0
    """first-order: remove only what gains at least so many standard errors (over the calibration items); more means
    fewer weights, chosen by what other items share."""
    loops: float | None = None
    """first-order: how strongly a mask turns away from what the model repeats under a draft of it, times how much more
    that is than without a mask; then, where the mask itself repeats more, it is chosen again, against that by half of
    this (docs/method.md). 0 writes nothing. Default 0.2, 0 under --strategy fsdp."""
    apart: bool = False
    """first-order: choose each pair's weights so that the run's other pairs stay as they are: what these have in common
    with it, such as the tone of their statements, is not its own. Needs two pairs or more; of no effect between sets of
    longer answers (docs/method.md)."""
    apart_yes_no: bool = False
    """first-order: leave the margin of Yes over No on a pair's questions as it is, so that a persona most of whose
    answers begin with one of them is told by the rest of what it says (docs/method.md)."""
    expert_tokens: int = 32
    """Mixture-of-experts: an expert that saw fewer counted tokens of a persona, or of its opponent, is scored by the
    statistics of all experts of its layer together, and listed in the manifest."""
    disjoint: bool = False
    """Exclude for the second pole what the first has kept (appendix K); above 50 % density the overlap that this
    forces is stated in the manifest."""
    include: str = ""
    """Regular expression: only layers whose name matches are masked."""
    exclude: str = ""
    """Regular expression: layers whose name matches are left alone (the output head always is)."""
    skip_blocks: float | None = None
    """Share of the decoder blocks, from the input on, that are left alone, in [0, 1): what is removed there changes the
    text more for what it does to the persona. Default 0.4 for first-order, 0 for the other criteria."""
    samples: int = 128
    """Calibration items per persona, drawn at random with the seed; 0 takes all."""
    max_length: int = 512
    """Longest sequence in tokens; answers are cut there, items whose question alone is longer are left out."""
    tokens: str = "predicting"
    """Which positions count: "predicting" (those that predict an answer token), "answer", "prompt" (the question's
    words) or "all" (question and answer). Padding and position 0 never do, nor do template tokens, except the last of
    the prompt, which predicts the answer's first."""
    batch_tokens: int = 2048
    """Tokens of a padded batch in the forward pass; one in a backward pass has half as many, one in which
    answers are written four times as many."""
    devices: str = "1"
    """Number of devices (processes on a CPU), a list such as 0,2, or "auto"."""
    num_nodes: int = 1
    """Number of machines."""
    accelerator: str = "auto"
    """auto, cpu, gpu, ... as Lightning names them."""
    strategy: str = "auto"
    """auto, ddp, ddp_fork, ...: how Lightning starts and joins the processes, each with the whole model; fsdp for a
    model larger than one device: each has a shard of every weight (docs/scale.md)."""
    precision: str = "32-true"
    """32-true, bf16-true, 16-true, bf16-mixed, ...: of the forward pass; statistics are float64 always."""
    stream: bool = False
    """For a model larger than memory: read it block by block from its safetensors files, run all batches through one
    block, write its masks, go on to the next. Criteria without gradients, in one process (docs/scale.md)."""
    stream_buffer: float = 1.0
    """--stream: GiB of hidden states that are held in memory between two blocks; what is beyond lies on disk, beside
    the output."""
    deterministic: bool = False
    """Make masks and statistics the same, bit for bit, on any number of devices of one kind: sums that do not depend on
    their order (four times the memory of the statistics), gradients added batch by batch in one order, one thread per
    process on a CPU (more processes use more cores)."""
    statistics: str = ""
    """Folder of an earlier run: take its statistics and only score anew (model and personas must be the same)."""
    output: Path = Path("runs/masks")
    """Folder to write; must be new, empty, or an earlier run with --overwrite."""
    overwrite: bool = False
    """Replace an earlier run in --output, or an unfinished one."""
    resume: Path | None = None
    """The --output folder of a run that was killed or stopped: go on where it was, with its options. Those given
    beside it must be the same, but for how masks are chosen (--criterion, --sparsity, --max-perplexity-increase,
    --activation, --temperature, --pool, --evidence): then only the masks are built anew."""
    checkpoint_every: float = 30.0
    """Seconds between two checkpoints of the statistics (or longer, so that they take at most 5 % of the time)."""
    on: str = ""
    """Calibrate the model as a mask of an earlier run leaves it, RUN:PERSONA (RUN alone, if it has one mask). What
    that mask removes stays removed, but for what first-order gives back, and the new masks come on top: a persona for a
    model that is pruned already."""
    strict: bool = False
    """Make rows that cannot be used an error instead of a report."""
    seed: int = 0
    """Seed of the item draw and of random masks."""

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        self.resume = Path(self.resume) if self.resume else None
        _at_least("checkpoint_every", self.checkpoint_every, 0)
        _one_of("criterion", self.criterion, CRITERIA)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("tokens", self.tokens, TOKENS)
        Sparsity.parse(self.sparsity)
        _at_least("temperature", self.temperature, 1e-6)
        _at_least("evidence", self.evidence, 0)
        _at_least("shift", self.shift, 0)
        _at_least("loops", self.loop_weight, 0)
        if isinstance(self.max_perplexity_increase, str):
            self.max_perplexity_increase = _fraction(self.max_perplexity_increase)
        _at_least("max_perplexity_increase", self.budget, 0)
        if not 0 <= self.skipped_blocks < 1:
            raise UserError(f"--skip-blocks must lie in [0, 1), got {self.skip_blocks}")
        if self.budget and self.disjoint:
            raise UserError("--max-perplexity-increase fits every persona alone, so it excludes --disjoint")
        _at_least("samples", self.samples, 0)
        _at_least("expert_tokens", self.expert_tokens, 1)
        _at_least("max_length", self.max_length, 2)
        _at_least("batch_tokens", self.batch_tokens, 1)
        _at_least("num_nodes", self.num_nodes, 1)
        _at_least("seed", self.seed, 0)
        parse_devices(self.devices)
        if not 0 < self.pool <= 1:
            raise UserError(f"--pool must lie in (0, 1], got {self.pool}")
        _at_least("stream_buffer", self.stream_buffer, 0)
        if self.stream:
            self._check_stream()
        self._check_strategy()
        if self.disjoint and self.criterion in ("random", "magnitude", "neutral", *SIGNED):
            raise UserError(f"--disjoint is for the paper's criteria, not {self.criterion!r}")

    @property
    def unread(self) -> list[str]:
        """Options that were set and that the criterion does not read."""
        set_here = [name for name in READERS if getattr(self, name) != getattr(CalibrateConfig, name)]
        return [name for name in set_here if self.criterion not in READERS[name]]

    def _check_stream(self) -> None:
        """Raise UserError for what a pass that never has the whole model in memory cannot do."""
        if self.resume:
            raise UserError("--stream keeps nothing to go on with, so it excludes --resume: begin anew")
        if self.criterion in FIRST_ORDER:
            forward = ", ".join(name for name in CRITERIA if name not in FIRST_ORDER)
            raise UserError(
                f"--stream has one block in memory, and {self.criterion} needs gradients through all of them; choose a "
                f"--criterion of {forward}"
            )
        if self.budget:
            raise UserError("--stream cannot measure perplexity, so it excludes --max-perplexity-increase")
        if self.on:
            raise UserError("--stream reads the model's own weights, so it excludes --on")
        if self.statistics:
            raise UserError("--stream measures anew; with --statistics the model is loaded as a whole")
        if str(self.devices).strip() != "1" or self.num_nodes != 1 or self.strategy != "auto":
            raise UserError("--stream runs in one process on one device: leave --devices, --num-nodes and --strategy")

    def _check_strategy(self) -> None:
        """Raise UserError for what cannot work with a model that is divided over devices."""
        if self.strategy.startswith(("fsdp_", "deepspeed", "model_parallel", "tensor")):
            raise UserError(
                f"--strategy {self.strategy} may cut up the inputs of layers, which have to be seen whole; for a model "
                f"larger than one device take --strategy fsdp"
            )
        if not self.sharded:
            return
        if self.on:
            raise UserError("--strategy fsdp reads the model's own weights, so it excludes --on")
        if self.budget:
            raise UserError(
                "--strategy fsdp does not measure perplexity, which a search for how much a mask may cost needs: add "
                "--max-perplexity-increase 0, which removes all of --sparsity"
            )
        if self.loops:
            raise UserError("--strategy fsdp has no model to write with, so it excludes --loops")
        if self.deterministic and self.criterion in FIRST_ORDER:
            raise UserError(
                "--strategy fsdp adds gradients in an order that depends on the number of devices: leave "
                f"--deterministic for {self.criterion}"
            )

    @property
    def sharded(self) -> bool:
        """Every process has a shard of every weight."""
        return self.strategy == "fsdp"

    @property
    def undivided(self) -> str:
        """The option that forbids to split a batch that does not fit into memory, if one does: other shapes of batches
        end in other last bits, and processes that share a model must take the same steps."""
        return "--deterministic" if self.deterministic else "--strategy fsdp" if self.sharded else ""

    @property
    def holds_apart(self) -> bool:
        """Pairs are kept apart from each other, and the criterion knows how."""
        return self.apart and self.criterion == WHITENED

    @property
    def holds_yes_no(self) -> bool:
        """Yes and No are left as they are, and the criterion knows how."""
        return self.apart_yes_no and self.criterion == WHITENED

    @property
    def holds_margins(self) -> bool:
        """There are margins beside a pair's own that its masks leave as they are."""
        return self.holds_apart or self.holds_yes_no

    @property
    def budget(self) -> float:
        """The relative rise in perplexity that a mask may cost; 0 is no limit."""
        if self.max_perplexity_increase is not None:
            return float(self.max_perplexity_increase)
        return 0.15 if self.criterion == WHITENED else 0.0

    @property
    def loop_weight(self) -> float:
        """How much what the masked model repeats weighs against a pole, times how much more it repeats than without a
        mask; 0: nothing is written."""
        if self.loops is not None:
            return self.loops
        return 0.2 if self.criterion == WHITENED and not self.sharded else 0.0

    @property
    def revises(self) -> bool:
        """Are finished masks looked at for what the model repeats under them?"""
        return self.criterion == WHITENED and self.loop_weight > 0

    @property
    def skipped_blocks(self) -> float:
        """The share of the decoder blocks, from the input on, that no mask touches."""
        if self.skip_blocks is not None:
            return self.skip_blocks
        return 0.4 if self.criterion == WHITENED else 0.0


@dataclass
class EvaluateConfig:
    """What to evaluate and how."""

    run: Path
    """Folder that pipeline.calibrate wrote."""
    data: str = ""
    """Held-out items, [PLUS[/MINUS]=]SOURCE, comma-separated; default: the test split of the shipped sets. Items
    whose question was calibrated on are left out."""
    pairs: str = ""
    """Only these pairs of opposing personas, comma-separated by their first persona; default all."""
    samples: int = 0
    """At most so many items per pair, drawn with the seed; 0 takes all."""
    model: str = ""
    """Model to load instead of the one in the manifest (it must have the same weights)."""
    precision: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto."""
    gamma: float = 0.0
    """Soft gate: share of a removed weight that stays, in [0, 1) (eq. 7)."""
    max_length: int = 1024
    """Longest sequence in tokens."""
    batch_tokens: int = 2048
    """Tokens of a padded batch; one in which answers are written has four times as many."""
    texts: int = 0
    """Perplexity on the first so many of the 40 neutral texts; 0 takes all."""
    bootstrap: int = 2000
    """Resamples for the 95 % intervals."""
    conditions: str = "prompt,mask,random"
    """What to compare with the unmasked model, comma-separated: prompt (a persona prompt), rag (the nearest
    calibration items as earlier turns of the chat), steering (a steering vector from the calibration items, as strong
    as the mask), lora (fine-tuned on the calibration answers, needs peft), mask (own and opponent's), prompt+mask (both
    at once), neutral (a mask made the same way from neutral text), base (the mask that --on named, alone), random
    (random masks), rows (random masks that remove as much of every row as the pole's mask), others (the masks of the
    run's other personas, and of --other-runs)."""
    other_runs: list[str] = field(default_factory=list)
    """others: further runs over the same model, whose masks are other personas' too: '["runs/a", "runs/b"]', or
    --other-runs+ RUN for each."""
    shots: int = 3
    """rag: how many calibration items stand before a question."""
    steering_layers: str = ""
    """steering: decoder blocks whose output the vector is added to, numbered from 0, comma-separated; default four
    around the middle."""
    steering_strength: str = "cost"
    """steering: a number, or what makes the vector as strong as the mask: "cost" (the perplexity of neutral answers)
    or "shift" (of the margin on calibration items, which a mask fits far better)."""
    lora_rank: int = 16
    """lora: rank of the adapters, which every masked layer gets."""
    lora_epochs: int = 3
    """lora: how often every calibration answer is learnt."""
    lora_rate: float = 5e-4
    """lora: learning rate."""
    draws: int = 2
    """Random masks for each pole; one alone says little. They come from the pool that the criterion chose from."""
    options: bool = True
    """Score two-way items also with the options shown, in both orders."""
    questions: int = 1
    """Held-out questions of the first pair whose answers are shown: unmasked, under the masks, and under those of the
    conditions prompt, rag, steering and prompt+mask that were chosen."""
    generate: int = 0
    """Measure the answers (repetition, length, judged margin) to so many held-out questions of every pair; 0 only those
    of --questions."""
    temperature: float = 0.0
    """Beside every greedy answer, one sampled at this temperature from the whole vocabulary, with the seed; 0 none."""
    efficiency: bool = False
    """Also measure what the first pair's conditions cost to serve: prompt tokens, time to the first token, tokens per
    second, memory and bytes on disk per persona."""
    tasks: str = ""
    """Tasks of lm-eval, comma-separated, that show what the model can still do under every mask, vector and adapter:
    "general" (100 questions of ours, offline), or any that lm-eval knows; needs the extra lm-eval."""
    task_items: int = 0
    """Only the first so many questions of each task; 0 takes all."""
    json: Path | None = None
    """Write the records here (schema in docs/evaluation.md)."""
    plot: Path | None = None
    """PNG of the results; default RUN/evaluation.png."""
    seed: int = 0
    """Seed of draws, bootstrap and random masks."""
    strict: bool = False
    """Make rows that cannot be used an error instead of a report."""

    def __post_init__(self) -> None:
        self.run = Path(self.run)
        self.plot = Path(self.plot) if self.plot else self.run / "evaluation.png"
        self.json = Path(self.json) if self.json else None
        _one_of("precision", self.precision, PRECISIONS)
        check_gamma(self.gamma)
        for condition in self.wanted:
            _one_of("conditions", condition, CONDITIONS)
        if self.other_runs and "others" not in self.wanted:
            raise UserError("--other-runs is read by --conditions others, which was not asked for")
        _at_least("temperature", self.temperature, 0)
        if self.steering_strength not in ("shift", "cost"):
            _at_least("steering_strength", _number(self.steering_strength), 0)
        for name in ("samples", "questions", "generate", "texts", "task_items", "seed"):
            _at_least(name, getattr(self, name), 0)
        _at_least("lora_rate", self.lora_rate, 0)
        for name in ("batch_tokens", "bootstrap", "draws", "shots", "lora_rank", "lora_epochs"):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_length", self.max_length, 2)

    @property
    def wanted(self) -> list[str]:
        """The names in ``conditions``, each once."""
        return list(dict.fromkeys(name.strip() for name in self.conditions.split(",")))


@dataclass
class ChatConfig:
    """Which masks to talk to and how to decode."""

    run: Path
    """Folder that pipeline.calibrate wrote."""
    persona: str = ""
    """Persona to start with; default the unmasked model."""
    model: str = ""
    """Model to load instead of the one in the manifest (it must have the same weights)."""
    precision: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto."""
    gamma: float = 0.0
    """Soft gate: share of a removed weight that stays, in [0, 1) (eq. 7)."""
    max_new_tokens: int = 160
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 answers greedily, above it samples."""
    system: str = field(default="")
    """System prompt; default the chat template's own."""
    seed: int = 0
    """Seed of sampling."""

    def __post_init__(self) -> None:
        self.run = Path(self.run)
        _one_of("precision", self.precision, PRECISIONS)
        check_gamma(self.gamma)
        _at_least("temperature", self.temperature, 0)
        _at_least("max_new_tokens", self.max_new_tokens, 1)


PRECISIONS = ("float32", "bfloat16", "float16")


def parse_devices(text: str) -> int | list[int] | str:
    """What Lightning takes: a count, a list of device indices, or "auto"."""
    text = str(text).strip()
    try:
        if text == "auto":
            return text
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--devices {text!r}: expected a number, a list such as 0,2, or auto") from None
    if "," in text:
        return values
    if values[0] < 1:
        raise UserError(f"--devices {text}: at least 1")
    return values[0]


def _share(text: str, where: str) -> Decimal:
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        raise UserError(f"{where}: {text.strip()!r} is not a number") from None
    if not (value.is_finite() and 0 <= value < 1):
        raise UserError(f"{where}: sparsity must lie in [0, 1), got {value}")
    return value


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"--{name}: unknown {value!r}; known are {', '.join(known)}")


def _at_least(name: str, value: float, least: float) -> None:
    if not (value >= least and math.isfinite(value)):
        raise UserError(f"--{name.replace('_', '-')} must be a number of at least {least}, got {value}")


def _fraction(text: str) -> float:
    """0.05 for "0.05" or "5%"; NaN for anything else."""
    number = text.strip().removesuffix("%")
    return _number(number) / 100 if text.strip().endswith("%") else _number(number)


def _number(text: str) -> float:
    """The number that a text spells, else NaN, which no bound lets pass."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_gamma(gamma: float) -> None:
    if not 0 <= gamma < 1:
        raise UserError(f"--gamma must satisfy 0 <= gamma < 1, got {gamma}")
