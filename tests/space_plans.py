"""Search spaces as plain data: `random_spaces` draws them, `space_models` builds, `space_by_hand` counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Nested:
    """A candidate with a choice of its own: `x + op(first(x))`."""

    first: str
    choice: Choice


@dataclass(frozen=True)
class Choice:
    """A LayerChoice; `key` None for an automatic one."""

    candidates: tuple[str | Nested, ...]
    named: bool = False
    reduction: str = "sum"
    return_mask: bool = False
    key: str | None = None


@dataclass(frozen=True)
class Layer:
    """One plain layer."""

    kind: str


@dataclass(frozen=True)
class Op:
    """A choice in place of a layer; nothing chosen leaves the value as it is."""

    choice: Choice


@dataclass(frozen=True)
class Residual:
    """`y = op(x); if y is not None: y = y + x` (or `y += x`)."""

    choice: Choice
    in_place: bool = False


@dataclass(frozen=True)
class Skip:
    """An InputChoice among up to `reach` earlier values, added if there is one."""

    reach: int
    n_chosen: int | None
    reduction: str = "sum"
    in_place: bool = False
    return_mask: bool = False


@dataclass(frozen=True)
class Cell:
    """Choices on the same value whose outputs feed an InputChoice, by list or by dict."""

    edges: tuple[Choice, ...]
    n_chosen: int | None
    reduction: str = "sum"
    by_name: bool = False


@dataclass(frozen=True)
class Dead:
    """A choice whose result nobody uses."""

    choice: Choice


@dataclass(frozen=True)
class Island:
    """Code that cannot be traced around a block; `how` is a key of ISLANDS."""

    how: str
    inner: Op | Residual


@dataclass(frozen=True)
class Scope:
    """A block inside a MutableScope."""

    key: str
    inner: Op | Residual


@dataclass(frozen=True)
class Twice:
    """The same module called two times in a row."""

    inner: Op | Residual


@dataclass(frozen=True)
class Again:
    """An earlier block (its index modulo the number of them), registered and called again."""

    index: int


Block = Layer | Op | Residual | Skip | Cell | Dead | Island | Scope | Twice | Again


@dataclass(frozen=True)
class Plan:
    """A search space. `root` is "net", "sequential" or "choice"; `inputs`, `outputs`: how it is called."""

    blocks: tuple[Block, ...]
    root: str = "net"
    inputs: str = "one"
    outputs: str = "tensor"


def resolved(plan: Plan) -> list[tuple[int, Block]]:
    """For every block the index of the one it is (itself, except for Again), and the block."""
    found: list[tuple[int, Block]] = []
    for index, block in enumerate(plan.blocks):
        if isinstance(block, Again):
            usable = [i for i, b in found if not isinstance(b, Skip)]
            first = usable[block.index % len(usable)] if usable else None
            found.append((index, Layer("identity")) if first is None else (first, found[first][1]))
        else:
            found.append((index, block))
    return found


def root_choice(plan: Plan) -> Choice:
    """The choice that is the whole model, where `root` is "choice"."""
    for block in plan.blocks:
        if isinstance(block, Op | Residual | Dead):
            return block.choice
    return Choice(("conv1", "conv3"))


def chain(plan: Plan) -> list[Block]:
    """The blocks of a sequential model."""
    return [block for block in plan.blocks if not isinstance(block, Skip | Again)]
