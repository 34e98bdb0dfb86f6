"""The training loop that others would write: transformers' LlamaForCausalLM, padded batches, torch's AdamW.

Our runs are compared with it, for equal losses and for speed. It needs transformers.
"""

import math

import torch
import transformers

from engine.text.templates import ALPACA_INPUT, ALPACA_NO_INPUT


def encode_rows(rows, tokenizer, max_length):
    """Return [(ids, labels)] as Stanford prepares them: prompt and output as one string, then EOS. Labels of the prompt
    are -100."""
    examples = []
    for row in rows:
        prompt = (ALPACA_INPUT if row.get("input") else ALPACA_NO_INPUT).format(**row)
        ids = tokenizer(prompt + row["output"])["input_ids"] + [tokenizer.eos_token_id]
        n_prompt = len(tokenizer(prompt)["input_ids"])
        examples.append((ids[:max_length], ([-100] * n_prompt + ids[n_prompt:])[:max_length]))
    return examples


def pad_examples(examples):
    """Return (ids, attention mask, labels), each (B, longest) and padded on the right."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples])
    return ids, mask, torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])


class TransformersLoop:
    """Steps of a LlamaForCausalLM under a cosine schedule that total_steps and warmup_ratio define.

    exact_norm computes the gradients' norm in fp64, for curves that are compared. On a CPU torch's own norm is off by
    1e-3 over a large tensor, and every clipped update would be off by as much. load: called with the folder
    and dtype, returns the model, which may be one under an adapter.
    """

    def __init__(
        self, folder, *, lr, total_steps, dtype=torch.float32, warmup_ratio=0.03, fused=False, exact_norm=False,
        load=transformers.LlamaForCausalLM.from_pretrained,
    ):  # fmt: skip
        self.exact_norm = exact_norm
        self.model = load(folder, dtype=dtype)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0, fused=fused)
        warmup = math.ceil(warmup_ratio * total_steps)
        self.schedule = transformers.get_cosine_schedule_with_warmup(self.optimizer, warmup, total_steps)

    def step(self, examples, micro, loss_norm="token"):
        """Take one optimizer step over examples in micro-batches of `micro`. Return (loss, gradient norm)."""
        parts = [pad_examples(examples[i : i + micro]) for i in range(0, len(examples), micro)]
        counts = [int((labels[:, 1:] != -100).sum()) for *_, labels in parts]
        loss = 0.0
        for (ids, mask, labels), count in zip(parts, counts, strict=True):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
            summed = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="sum")
            part = summed / (sum(counts) if loss_norm == "token" else count * len(parts))
            part.backward()
            loss += part.item()
        norm = self.clip()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss, norm.item()

    def clip(self):
        """Clip the gradients at a norm of 1.0 and return the norm they had."""
        if not self.exact_norm:
            return torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        norm = torch.stack([p.grad.double().norm() for p in self.trained]).norm().float()
        torch.nn.utils.clip_grads_with_norm_(self.trained, 1.0, norm)
        return norm
