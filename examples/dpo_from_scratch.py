"""DPO on one page (Rafailov et al. 2023): a model learns which of two answers is better, without a reward model.

    python examples/dpo_from_scratch.py          # about a minute on a CPU

The reference is the base under the adapter: `with disabled(model)` runs it, so that no second model stands in memory.
Both answers of several prompts are documents of one packed row, which do not see each other. The demo model learns to
prefer the right snippet to another question's; the questions that are counted are not trained on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft import (
    Batch,
    LoRAConfig,
    Pair,
    add_adapter,
    disabled,
    encode_pairs,
    load_model,
    load_pairs,
    load_tokenizer,
)
from minipeft.data.examples import Example
from minipeft.models import Decoder

BETA, STEPS, PAIRS = 0.1, 30, 4  # beta of the paper's equation 7; pairs to a row


def pack(chosen: list[Example], rejected: list[Example]) -> Batch:
    """One row: documents 0, 2, 4, ... are the chosen answers with their prompts, 1, 3, 5, ... the rejected ones.

    Labels are the ids of the answers, -100 on the prompts. -> three of [1, T]
    """
    ids, labels, documents = [], [], []
    for number, example in enumerate(e for pair in zip(chosen, rejected) for e in pair):
        ids += example.ids
        labels += [-100] * example.prompt_tokens + example.ids[example.prompt_tokens :]
        documents += [number] * len(example.ids)
    return Batch(torch.tensor([ids]), torch.tensor([labels]), torch.tensor([documents]))


def log_probabilities(model: Decoder, batch: Batch) -> Tensor:
    """log pi(y | x) of each document: the sum over its answer's tokens. -> [documents]"""
    logits = model(batch.ids, batch.documents)[:, :-1]  # [1, T - 1, V], of the next token
    labels, documents = batch.labels[0, 1:], batch.documents[0, 1:]  # [T - 1]
    answers = labels != -100  # a document's first token is never one: its prediction is the former document's
    each = logits[0, answers].log_softmax(dim=-1).gather(1, labels[answers, None])[:, 0]  # [answer tokens]
    return torch.zeros(int(documents[-1]) + 1).index_add(0, documents[answers], each)


def dpo_loss(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Equation 7, the mean over the pairs, and the margin beta (r_w - r_l) of each pair.

    -log sigmoid(beta (log pi(y_w | x) / pi_ref(y_w | x)  -  log pi(y_l | x) / pi_ref(y_l | x)))
    """
    with torch.no_grad(), disabled(model):
        reference = log_probabilities(model, batch)  # [2 pairs]
    ratios = (log_probabilities(model, batch) - reference).view(-1, 2)  # [pairs, 2]: of the chosen, of the rejected
    margins = BETA * (ratios[:, 0] - ratios[:, 1])  # [pairs]
    return -F.logsigmoid(margins).mean(), margins


def preference_rows(pairs: list[Pair], tokenizer: object) -> list[Batch]:
    """Rows of PAIRS pairs: the chosen answer is the question's own, the rejected one that of the next question."""
    wrong = [Pair(p.intent, q.snippet) for p, q in zip(pairs, [*pairs[1:], pairs[0]])]
    chosen, rejected = encode_pairs(pairs, tokenizer), encode_pairs(wrong, tokenizer)
    starts = range(0, len(pairs) - PAIRS + 1, PAIRS)
    return [pack(chosen[i : i + PAIRS], rejected[i : i + PAIRS]) for i in starts]


def main() -> None:
    torch.manual_seed(0)
    model, tokenizer = load_model("demo", dtype=torch.float32), load_tokenizer("demo")
    pairs = list(load_pairs("demo"))[: PAIRS * (STEPS + 4)]
    rows = preference_rows(pairs, tokenizer)
    train, held_out = rows[:STEPS], rows[STEPS:]
    print(add_adapter(model, LoRAConfig(rank=8)), end="\n\n")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.0)

    def say(step: int) -> None:
        with torch.no_grad():
            losses, margins = zip(*(dpo_loss(model, row) for row in held_out))
        right = (torch.cat(margins) > 0).float().mean().item()
        loss = torch.stack(losses).mean()
        print(f"step {step:3}: held-out loss {loss:.4f}, {right:4.0%} of the pairs on the right side")

    say(0)  # policy and reference are one model: log 2
    for step, row in enumerate(train, 1):
        loss, _ = dpo_loss(model, row)  # in eval mode: without dropout, as the reference
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (STEPS // 3) == 0:
            say(step)


if __name__ == "__main__":
    main()
