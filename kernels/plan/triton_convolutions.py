"""How convolutions and their gradients are carried out on a GPU: the launches of Triton kernels, and their
records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nascompile.kernels.plan.steps import (
    NONE,
    Activation,
    Combine,
    Convolve,
    ConvolveBackward,
    Map,
    Space,
    Tap,
)
from nascompile.kernels.plan.triton_areas import Area, block_area, sum_areas, weights_area
from nascompile.kernels.plan.triton_blocks import block_of, dense_block, gradient_block
from nascompile.kernels.plan.triton_launches import Entry, Launches
from nascompile.kernels.plan.triton_schedule import Job


@dataclass(frozen=True, slots=True)
class Gradient:
    """A map in work memory: its sizes, its words in the table, and its memory."""

    place: Map
    words: list[int]
    area: Area


def weights_flag(step: ConvolveBackward) -> int:
    """Under which flag the gradients of the weights are summed over pixels: their own holds only where the
    step's does."""
    return step.flag if step.gradient_flag == NONE else step.gradient_flag


class Convolutions(Launches):
    """Launches, and how convolutions are lowered to them."""

    def view(self, x: Map, strides: tuple[int, int]) -> list[int]:
        """A map as the outputs of a convolution see it: `strides` pixels apart."""
        words = self.table.map(x)
        words[3] *= strides[0]
        words[4] *= strides[1]
        return words

    def convolve(self, step: Convolve) -> None:
        y = step.y
        is_depthwise, is_dense = bool(step.depthwise_taps), bool(step.taps)
        block = dense_block(y.channels) if is_dense else block_of(y.channels)
        record = [step.flag, *self.view(step.x, (step.stride_h, step.stride_w)), *self.table.map(y)]
        record += self.table.taps(step.depthwise_taps if is_depthwise else step.taps)
        record += [step.depthwise_weights if is_depthwise else step.weights, 0]
        record += [self.moments(step, y, block), step.weights]
        kernel = "depthwise" if not is_dense else "separable" if is_depthwise else "dense"
        reads = [self.seen(step, y)]
        reads += weights_area(step.depthwise_weights, step.depthwise_taps, step.x.channels)
        reads += weights_area(step.weights, step.taps, step.x.channels * y.channels)
        self.over(kernel, y, block, record, f"convolve: {kernel}", reads)

    def seen(self, step: Convolve | ConvolveBackward, y: Map) -> Area:
        """What of x a convolution with outputs like y reads."""
        x = step.x
        place = Map(
            *(x.space, x.offset, x.image, x.row * step.stride_h, x.pixel * step.stride_w),
            *(x.channels, y.height, y.width),
        )
        return self.area(place, step.depthwise_taps or step.taps)

    def convolve_backward(self, step: ConvolveBackward) -> None:
        is_depthwise, is_dense = bool(step.depthwise_taps), bool(step.taps)
        dd = step.padded
        # where dd takes the padded image, dy goes behind scratch
        dy = self.dy(step) if is_depthwise and is_dense else Gradient(dd, self.table.map(dd), self.area(dd))
        block = block_of(step.y_channels)
        record = [
            step.flag,
            *dy.words,
            *self.table.terms(step.terms),
            step.constant,
            Activation.none,
            0,
            NONE,
        ]
        name = "convolve backward: dy"
        reads = sum_areas(step.terms, step.constant, self.images, step.y_channels)
        self.over("combine", dy.place, block, record, name, reads, [dy.area])
        source = self.view(step.x, (step.stride_h, step.stride_w))
        if is_dense and step.gradient != NONE:
            self.dense_gradient(step, source, dy)
        if dy.place is not dd:
            record = [step.flag, *dy.words, *self.table.map(dd), *self.table.taps((Tap(0, 0),))]
            record += [step.weights_transposed, 0, NONE]
            size = dd.channels * step.y_channels
            reads = [dy.area, *weights_area(step.weights_transposed, step.taps, size)]
            self.over("dense", dd, dense_block(dd.channels), record, "convolve backward: dd", reads)
        if is_depthwise and step.depthwise_gradient != NONE:
            self.depthwise_gradient(step, source, dd)
        if step.needs_input:
            self.input_gradient(step, dd)

    def dy(self, step: ConvolveBackward) -> Gradient:
        """A place of its own for the gradient of a convolution's output."""
        channels, height, width = step.y_channels, step.y_height, step.y_width
        row, image = width * channels, height * width * channels
        at = self.places.take(self.images * image)
        place = Map(Space.slab, at, image, row, channels, channels, height, width)
        words = [1, *self.table.map(place)[1:]]
        return Gradient(place, words, block_area("work", at, self.images * image))

    def weights_sums(
        self, step: ConvolveBackward, taps: Sequence[Tap], shares: int, size: int, at: int
    ) -> int:
        """Partial sums [share][tap][size] for the gradients of the taps' weights."""
        partials, width = self.take(shares * len(taps) * size), len(taps) * size
        if [tap.weight for tap in taps] == list(range(len(taps))):
            goals = [(0, width, at)]
        else:
            goals = [(k * size, size, at + tap.weight * size) for k, tap in enumerate(taps)]
        for column, columns, target in goals:
            flags = (step.flag, step.gradient_flag)
            self.entries.append(Entry(flags, partials + column, shares, width, columns, target, False))
        return partials

    def dense_gradient(self, step: ConvolveBackward, source: list[int], dy: Gradient) -> None:
        inputs, outputs = step.x.channels, step.y_channels
        block = {**gradient_block(outputs, inputs), "DEPTHWISE": bool(step.depthwise_taps)}
        taps = (Tap(0, 0),) if step.depthwise_taps else step.taps
        blocks = len(taps) * (inputs // block["BLOCK_I"]) * (outputs // block["BLOCK_C"])
        tiles = self.grid(dy.place, block)[0]
        size = len(taps) * inputs * outputs
        shares = max(1, min(tiles, -(-512 // blocks), (1 << 22) // size))
        at = self.weights_sums(step, taps, shares, inputs * outputs, step.gradient)
        record = [weights_flag(step), *source, *dy.words, *self.table.taps(step.depthwise_taps or step.taps)]
        record += [step.depthwise_weights, shares, at]
        reads = [self.seen(step, dy.place), dy.area]
        reads += weights_area(step.depthwise_weights, step.depthwise_taps, inputs)
        name, grid = "convolve backward: dense gradient", (shares, blocks)
        self.jobs.append(Job("dense_gradient", block, grid, [record], name, reads, ()))

    def depthwise_gradient(self, step: ConvolveBackward, source: list[int], dd: Map) -> None:
        taps, channels = step.depthwise_taps, dd.channels
        block = block_of(channels)
        at = self.weights_sums(step, taps, self.grid(dd, block)[0], channels, step.depthwise_gradient)
        record = [weights_flag(step), *source, *self.table.map(dd), *self.table.taps(taps), NONE, 0, at]
        name, reads = "convolve backward: depthwise gradient", [self.seen(step, dd), self.area(dd)]
        self.over("depthwise_gradient", dd, block, record, name, reads, ())

    def input_gradient(self, step: ConvolveBackward, dd: Map) -> None:
        dx = step.dx
        covered = sum(grid.rows * grid.columns for grid in step.grids if grid.taps)
        is_whole = covered == dx.height * dx.width
        if not step.adds and not is_whole:
            self.lower_step(Combine((), NONE, Activation.none, dx, 0, NONE, flag=step.flag))
        is_depthwise = bool(step.depthwise_taps)
        block = block_of(dx.channels) if is_depthwise else dense_block(dx.channels)
        weights = step.depthwise_weights if is_depthwise else step.weights_transposed
        size = dx.channels if is_depthwise else dx.channels * step.y_channels
        reads = weights_area(weights, step.depthwise_taps or step.taps, size)
        records, grids = [], [(0, 0)]
        for grid in step.grids:
            if not grid.taps or not grid.rows or not grid.columns:
                continue
            part = Map(
                *(dx.space, dx.offset + grid.top * dx.row + grid.left * dx.pixel, dx.image),
                *(dx.row * grid.step_h, dx.pixel * grid.step_w, dx.channels, grid.rows, grid.columns),
            )
            record = [
                step.flag,
                *self.table.map(dd),
                *self.table.map(part),
                *self.table.taps(grid.taps),
                weights,
                int(step.adds or not is_whole),
                NONE,
            ]
            records.append(record)
            seen = replace(dd, height=grid.rows, width=grid.columns)
            reads.append(self.area(seen, grid.taps))
            grids.append(self.grid(part, block))
        if records:
            size = max(x for x, _ in grids), max(y for _, y in grids)
            kernel = "depthwise" if is_depthwise else "dense"
            name = "convolve backward: dx"
            self.jobs.append(Job(kernel, block, size, records, name, reads, [self.area(dx)]))
