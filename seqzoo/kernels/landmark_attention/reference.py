"""The equation, one token after the other and one sequence after the other, in float32 or better."""

from __future__ import annotations

import torch

from seqzoo.kernels.backends import accumulation_dtype, share_heads


def landmark_attention(q, k, v, landmarks, place, block, top_k, scale):
    wide = accumulation_dtype(v)
    keys, values, marks = (share_heads(x, q).to(wide) for x in (k, v, landmarks))
    before, rows = k.shape[1] - q.shape[1], []
    for row in range(len(q)):
        for t in range(q.shape[1]):
            own, query = before + t, q[row, t].to(wide) * scale
            first = own - int(place[row, own])
            begins = list(range(first, own + 1, block))
            logits = (keys[row, begins[-1] : own + 1] * query).sum(-1)  # of the own block, [slot, head]
            outputs = list(values[row, begins[-1] : own + 1])
            if len(begins) > 1:
                of_blocks = torch.stack([(marks[row, begin + block - 1] * query).sum(-1) for begin in begins[:-1]])
                if top_k is not None and top_k < len(of_blocks):
                    least = of_blocks.topk(top_k, 0).values[-1]
                    of_blocks = of_blocks.masked_fill(of_blocks < least, -torch.inf)
                logits = torch.cat([logits, of_blocks])
                for begin in begins[:-1]:
                    inside = (keys[row, begin : begin + block] * query).sum(-1).softmax(0)
                    outputs.append((inside[..., None] * values[row, begin : begin + block]).sum(0))
            rows.append((logits.softmax(0)[..., None] * torch.stack(outputs)).sum(0))
    return torch.stack(rows).view(*q.shape[:3], v.shape[3]).to(v.dtype)
