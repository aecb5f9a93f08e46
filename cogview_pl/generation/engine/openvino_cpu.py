"""CPU form of the model by OpenVINO: a step is one call of a compiled graph, which holds keys and values itself.

OpenVINO appends the positions of every pass to all rows. So rows of different lengths, refused drafts and rows that
idle leave positions in the cache that do not count; a mask hides them, and they are removed when they take too much.

Shapes: R rows, L new positions, S stored positions, D hidden size, H heads, K head size, n ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogview_pl.generation.engine.openvino_graph import head_graph, step_graph
from cogview_pl.kernels.openvino import import_openvino
from cogview_pl.transformer.model import Transformer

_UNSEEN = np.float32(-1e30)  # added to the score of a key that a query must not see; its weight becomes 0
_SLACK = 256  # positions that do not count and may stay besides as many as count

_OPTIONS = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
    "ENABLE_CPU_PINNING": False,  # several processes may share the cores
    # Only the weights are quantized, if at all.
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


Ids = NDArray[np.int64]
Marks = NDArray[np.bool_]


class OpenVinoModel:
    """Hidden states and logits of a model; see `can_export`. It holds a second copy of the weights of linear maps.

    Args:
        model: the sequence model; later changes of its weights are not followed.
        ids: ranges that logits are computed over, end to end.
    """

    def __init__(self, model: Transformer, ids: Sequence[range]) -> None:
        core = import_openvino().Core()
        options = {**_OPTIONS, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._graph = core.compile_model(step_graph(model, ids), "CPU", options)
        self._head = core.compile_model(head_graph(model, ids), "CPU", options).create_infer_request()
        self._last_RD, self._last_logits_Rn = torch.empty(0), torch.empty(0)

    def new_cache(self, rows: int) -> OpenVinoCache:
        """An empty KV cache."""
        return OpenVinoCache(_Stored(self._graph, rows))

    def hidden(self, tokens: Tensor, positions: Tensor, cache: OpenVinoCache) -> Tensor:
        """Final normalised hidden states `(R, L, D)`; see `Transformer.hidden`."""
        hidden_RLD, self._last_logits_Rn = cache.run(tokens, positions)
        self._last_RD = hidden_RLD[:, -1]
        return hidden_RLD

    def logits(self, hidden: Tensor, ids: Sequence[range] | None = None) -> Tensor:
        """Logits `(…, n)` of hidden states `(…, D)`; `ids` are always those of the constructor."""
        last_RD = self._last_RD
        if hidden.data_ptr() == last_RD.data_ptr() and hidden.numel() == last_RD.numel():  # the step had them
            return self._last_logits_Rn.view(*hidden.shape[:-1], -1)
        found = self._head.infer([hidden.reshape(-1, hidden.shape[-1]).numpy()], share_inputs=True)[0]
        return torch.from_numpy(found).view(*hidden.shape[:-1], -1)


class OpenVinoCache:
    """KV cache of R rows; `rows` gives some of them as a cache of their own on the same memory.

    Args:
        stored: the positions of all rows.
        part: rows of this cache; None: all.
    """

    def __init__(self, stored: _Stored, part: slice | None = None) -> None:
        self._stored, self._part = stored, part
        self._new = slice(0, 0)  # positions of the last pass

    def rows(self, part: slice) -> OpenVinoCache:
        """Some of the rows; each pass over them adds a position that does not count to the others."""
        return OpenVinoCache(self._stored, part)

    def clear(self) -> None:
        """Forget all positions."""
        if self._part is None:
            self._stored.clear()
        else:
            self._stored.valid_RS[self._part] = False

    def run(self, tokens_RL: Tensor, positions_RL: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `(R, L, D)` of the next positions, and logits `(R, n)` of the last one.

        Some of the rows take one position, or a whole prompt.
        """
        stored, length = self._stored, tokens_RL.shape[1]
        if self._part is None:
            found = stored.run(tokens_RL.numpy(), positions_RL.numpy())
        elif length == 1:
            every = np.zeros((2, stored.num_rows, 1), dtype=np.int64)  # other rows read the token 0
            every[0, self._part], every[1, self._part] = tokens_RL.numpy(), positions_RL.numpy()
            hidden_RLD, logits_Rn = stored.run(*every)
            found = hidden_RLD[self._part], logits_Rn[self._part]
        else:
            assert not stored.valid_RS[self._part].any()
            prompts = _Stored(stored.graph, len(tokens_RL))
            found = prompts.run(tokens_RL.numpy(), positions_RL.numpy())
            stored.put(self._part, prompts)
            self._new = slice(0, length)
            return found
        self._new = slice(stored.size - length, stored.size)
        return found

    def advance(self, lengths: Sequence[int] | int) -> None:
        """Count the first positions of the last pass as valid: one number for all rows, or one for each row."""
        if lengths == 1:
            self._stored.valid_RS[self._part or slice(None), self._new.start] = True
            return
        count = self._new.stop - self._new.start
        counts_R1 = np.atleast_1d(np.asarray(lengths))[:, None]
        self._stored.valid_RS[self._part or slice(None), self._new] = np.arange(count) < counts_R1


class _Stored:
    """Keys and values of all rows, in an inference request, and which positions count.

    Attributes:
        size: S.
    """

    def __init__(self, graph: Any, num_rows: int) -> None:
        self.graph, self.num_rows, self.size = graph, num_rows, 0
        self._request = graph.create_infer_request()
        self._rows = np.arange(num_rows, dtype=np.int32)
        self._valid_RC: Marks = np.zeros((num_rows, _SLACK), dtype=np.bool_)

    @property
    def valid_RS(self) -> Marks:
        """Which positions count; a view, to be changed in place."""
        return self._valid_RC[:, : self.size]

    def clear(self) -> None:
        """Forget all positions."""
        self._request.reset_state()
        self._valid_RC[:] = False
        self.size = 0

    def run(self, tokens_RL: Ids, positions_RL: Ids) -> tuple[Tensor, Tensor]:
        """Append L positions, which do not count yet, to all rows; returns what the graph does."""
        if self.size > 2 * int(self.valid_RS.sum(1).max(initial=0)) + _SLACK:
            self._rebuild()
        length = tokens_RL.shape[1]
        inputs = [tokens_RL, positions_RL, self._scores(length), self._rows]
        found = self._request.infer(inputs, share_inputs=True)
        if self.size + length > self._valid_RC.shape[1]:
            more = np.zeros((self.num_rows, self.size + length), dtype=np.bool_)
            self._valid_RC = np.concatenate([self.valid_RS, more], 1)
        self.size += length
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def put(self, part: slice, prompts: _Stored) -> None:
        """Replace all positions of some rows by those of `prompts`, which do not count yet."""
        self.valid_RS[part] = False
        self._rebuild({state.name: (part, state.state.data) for state in prompts._request.query_state()})

    def _scores(self, length: int) -> NDArray[np.float32]:
        """What is added to attention scores, `(R or 1, 1, L, S + L)`."""
        if length == 1 and self.valid_RS.all():
            return np.zeros((1, 1, 1, self.size + 1), dtype=np.float32)
        sees_RLS = np.empty((self.num_rows, length, self.size + length), dtype=np.bool_)
        sees_RLS[..., : self.size] = self.valid_RS[:, None]
        sees_RLS[..., self.size :] = np.tri(length, dtype=np.bool_)
        return np.where(sees_RLS, np.float32(0), _UNSEEN)[:, None]

    def _rebuild(self, new: Mapping[str, tuple[slice, NDArray[np.float32]]] | None = None) -> None:
        """Move the positions that count to the front of each row.

        `new` has keys or values of rows that have none, by the name of their variable.
        """
        kept = [np.flatnonzero(row) for row in self.valid_RS]
        size = max(map(len, kept))
        for state in self._request.query_state():
            part, new_RHPK = (new or {}).get(state.name, (slice(0), None))
            old_RHSK = state.state.data if any(map(len, kept)) else new_RHPK
            assert old_RHSK is not None
            _, heads, _, head_size = old_RHSK.shape
            length = size if new_RHPK is None else max(size, new_RHPK.shape[2])
            moved_RHSK = np.zeros((self.num_rows, heads, length, head_size), dtype=np.float32)
            for row, places in enumerate(kept):
                if len(places):
                    moved_RHSK[row, :, : len(places)] = old_RHSK[row][:, places]
            if new_RHPK is not None:
                moved_RHSK[part, :, : new_RHPK.shape[2]] = new_RHPK
            state.state = import_openvino().Tensor(moved_RHSK)
            self.size = length
        self._valid_RC = np.arange(self.size) < np.array([[len(places)] for places in kept])
