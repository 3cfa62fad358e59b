"""The controller of ENAS: an LSTM that samples one decision after another, and knows how probable it was."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.compiler.errors import SpaceError
from nascompile.compiler.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.space import StructuredMutableTreeNode


class EnasMutator(Mutator):
    """Samples architectures with a learned policy (Pham 2018, arXiv 1802.03268); NNI 1.x signature.

    `tanh_constant` and `temperature` bound and flatten the logits (None: not applied), `branch_bias` is added
    to the logits of convolutions and subtracted from the others in LayerChoices whose key contains "reduce",
    `cell_exit_extra_step` takes one more LSTM step at the end of a MutableScope, `skip_target` is the wanted
    probability of a skip connection (an input of an InputChoice with `n_chosen=None`), and
    `entropy_reduction` ("sum" or "mean") combines the inputs of one such choice.

    After `reset()`, over all decisions of the sample (0-d tensors):
    `sample_log_prob`: the *negative* log-probability, called as in NNI, so that minimising it times the
    advantage is REINFORCE; `sample_entropy`: the entropy of the policy, detached, it only shifts the reward;
    `sample_skip_penalty`: the divergence KL(skip probability || skip_target), of the probability that is
    really sampled with. (The reference samples with sigmoid(2q) and penalises sigmoid(q).)

    LayerChoices of different lengths get a head and an embedding for each length. `n_chosen` inputs are
    sampled one after another without replacement, so the log-probability is that of the order they came in.
    Inputs without a source key are told apart (in NNI they share one hidden state and could not be learned).
    """

    def __init__(
        self,
        model: nn.Module,
        lstm_size: int = 64,
        lstm_num_layers: int = 1,
        tanh_constant: float | None = 1.5,
        cell_exit_extra_step: bool = False,
        skip_target: float = 0.4,
        temperature: float | None = None,
        branch_bias: float = 0.25,
        entropy_reduction: str = "sum",
    ) -> None:
        if entropy_reduction not in ("sum", "mean"):
            raise SpaceError(f'entropy_reduction is {entropy_reduction!r}, expected "sum" or "mean"')
        if not 0 < skip_target < 1:
            raise SpaceError(f"skip_target is {skip_target}, expected a probability between 0 and 1")
        super().__init__(model)
        self.tanh_constant = tanh_constant
        self.temperature = temperature
        self.cell_exit_extra_step = cell_exit_extra_step
        self._reduce = torch.sum if entropy_reduction == "sum" else torch.mean

        self.lstm = nn.ModuleList(
            nn.LSTMCell(lstm_size, lstm_size, bias=False) for _ in range(lstm_num_layers)
        )
        self.attn_anchor = nn.Linear(lstm_size, lstm_size, bias=False)
        self.attn_query = nn.Linear(lstm_size, lstm_size, bias=False)
        self.v_attn = nn.Linear(lstm_size, 1, bias=False)
        self.g_emb = nn.Parameter(torch.empty(1, lstm_size))
        layer_choices = [choice for choice in self.choices_by_key.values() if isinstance(choice, LayerChoice)]
        lengths = sorted({len(choice) for choice in layer_choices if len(choice)})
        self.soft = nn.ModuleDict({str(n): nn.Linear(lstm_size, n, bias=False) for n in lengths})
        self.embedding = nn.ModuleDict({str(n): nn.Embedding(n, lstm_size) for n in lengths})
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        self.skip_target = skip_target
        self._biases = {
            choice.key: [branch_bias if _is_convolution(candidate) else -branch_bias for candidate in choice]
            for choice in layer_choices
            if "reduce" in choice.key and branch_bias
        }
        self._final: dict[str, Tensor] | None = None
        self._begin()

    def sample_search(self) -> dict[str, Any]:
        """A sample of the policy: a boolean CPU tensor for every key."""
        self._begin()
        for child in self.mutables.children:
            self._sample(child)
        return {key: self._masks[key] for key in self.choices_by_key}

    @torch.no_grad()
    def sample_final(self) -> dict[str, Any]:
        """The architecture given to `keep`, or a sample of the policy."""
        return self.sample_search() if self._final is None else dict(self._final)

    def keep(self, masks: dict[str, Tensor] | None) -> None:
        """Make `masks` the final architecture; None goes back to sampling."""
        self._final = masks

    def _begin(self) -> None:
        zero = self.g_emb.new_zeros(())
        self.sample_log_prob = zero
        self.sample_entropy = zero
        self.sample_skip_penalty = zero
        self._masks: dict[str, Tensor] = {}
        self._anchors: dict[object, Tensor] = {}
        self._inputs = self.g_emb.view_as(self.g_emb)  # a Parameter would be registered under this name
        self._state = [(torch.zeros_like(self.g_emb), torch.zeros_like(self.g_emb)) for _ in self.lstm]

    def _sample(self, node: StructuredMutableTreeNode) -> None:
        mutable = node.mutable
        if isinstance(mutable, LayerChoice) and mutable.key not in self._masks:
            self._masks[mutable.key] = self._sample_layer(mutable)
        elif isinstance(mutable, InputChoice) and mutable.key not in self._masks:
            self._masks[mutable.key] = self._sample_inputs(mutable)
        for child in node.children:
            self._sample(child)
        if isinstance(mutable, MutableScope) and mutable.key not in self._anchors:
            if self.cell_exit_extra_step:
                self._step()
            self._anchors[mutable.key] = self._hidden

    def _step(self) -> None:
        signal = self._inputs
        for index, cell in enumerate(self.lstm):
            self._state[index] = cell(signal, self._state[index])
            signal = self._state[index][0]

    @property
    def _hidden(self) -> Tensor:
        return self._state[-1][0]

    def _bound(self, logits: Tensor) -> Tensor:
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.tanh_constant is not None:
            logits = self.tanh_constant * torch.tanh(logits)
        return logits

    def _sample_layer(self, choice: LayerChoice) -> Tensor:
        if len(choice) == 0:
            return torch.zeros(0, dtype=torch.bool)
        self._step()
        logits = self._bound(self.soft[str(len(choice))](self._hidden))
        if choice.key in self._biases:
            logits = logits + logits.new_tensor(self._biases[choice.key])
        branch = self._draw(logits)
        self._inputs = self.embedding[str(len(choice))](branch)
        return F.one_hot(branch[0], len(choice)).bool().cpu()

    def _sample_inputs(self, choice: InputChoice) -> Tensor:
        anchors = torch.cat([self._anchor(choice, index) for index in range(len(choice))])  # (n, lstm_size)
        self._step()
        attention = self.v_attn(torch.tanh(self.attn_anchor(anchors) + self.attn_query(self._hidden)))
        query = self._bound(attention)  # (n, 1)
        if choice.n_chosen is None:
            return self._sample_skips(query, anchors)
        remaining = torch.ones(len(choice), dtype=torch.bool, device=query.device)
        for _ in range(choice.n_chosen):
            index = self._draw(query.view(1, -1).masked_fill(~remaining, -torch.inf))
            # a new tensor: the backward pass still needs the earlier mask
            remaining = remaining & ~F.one_hot(index[0], len(choice)).bool()
        chosen = ~remaining
        if choice.n_chosen:
            self._inputs = anchors[chosen].mean(0, keepdim=True)
        return chosen.cpu()

    def _sample_skips(self, query: Tensor, anchors: Tensor) -> Tensor:
        logits = torch.cat([-query, query], dim=1)  # (n, 2): leave, take
        skip = self._draw(logits)
        log_p = F.log_softmax(logits, dim=-1)
        wanted = log_p.new_tensor([1 - self.skip_target, self.skip_target]).log()
        self.sample_skip_penalty = self.sample_skip_penalty + (log_p.exp() * (log_p - wanted)).sum()
        taken = skip.to(anchors.dtype)
        self._inputs = (taken @ anchors / (1 + taken.sum())).unsqueeze(0)
        return skip.bool().cpu()

    def _anchor(self, choice: InputChoice, index: int) -> Tensor:
        source = choice.choose_from[index]
        label = source if source != InputChoice.NO_KEY else (choice.key, index)
        if label not in self._anchors:
            self._step()
            self._anchors[label] = self._hidden
        return self._anchors[label]

    def _draw(self, logits: Tensor) -> Tensor:
        """Sample one index for each row of `logits` (rows, n) and account for its probability and entropy."""
        log_p = F.log_softmax(logits, dim=-1)
        index = torch.multinomial(log_p.detach().exp(), 1)
        self.sample_log_prob = self.sample_log_prob - self._reduce(log_p.gather(1, index))
        self.sample_entropy = self.sample_entropy + self._reduce(
            torch.special.entr(log_p.detach().exp()).sum(-1)
        )
        return index.view(-1)


def _is_convolution(candidate: object) -> bool:
    return "conv" in type(candidate).__name__.lower()
