"""How many tokens a pass would yield if prompt lookup drafted the answers: the most that it can gain, without a model.

    python benchmarks/prompt_lookup.py --model FOLDER --data conala-paired-test.json

Prompt lookup (Saxena 2023) drafts the tokens that followed the last n tokens where they occurred before, in the prompt
or the answer; one pass verifies them (Leviathan et al. 2023). Here the answers are the data's own: a model whose
answers were right would accept as many. A pass over more rows takes longer, so the gain in time is smaller.
"""

import argparse

import minipeft

LENGTHS = (2, 3, 5, 8, 10)  # tokens of a draft


def draft(context: list[int], most: int, least: int, length: int) -> list[int]:
    """What followed the last occurrence of the longest n-gram, least <= n <= most, that ends the context."""
    for n in range(most, least - 1, -1):
        for start in range(len(context) - n - 1, -1, -1):
            if context[start : start + n] == context[-n:]:
                return context[start + n : start + n + length]
    return []


def count_passes(prompt: list[int], answer: list[int], most: int, least: int, length: int) -> tuple[int, int]:
    """The passes that yield the answer, and the rows that they compute."""
    made = passes = rows = 0
    while made < len(answer):
        drafted = draft(prompt + answer[:made], most, least, length)
        pairs = zip(drafted, answer[made:])
        accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(drafted), len(answer) - made))
        made, passes, rows = made + accepted + 1, passes + 1, rows + 1 + len(drafted)
    return passes, rows


def main() -> None:
    """Print a row for each n-gram length and draft length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    tokenizer = minipeft.load_tokenizer(options.model)
    examples = minipeft.encode_pairs(minipeft.load_pairs(options.data), tokenizer)
    texts = [(e.ids[: e.prompt_tokens], e.ids[e.prompt_tokens :]) for e in examples]
    tokens = sum(len(answer) for _, answer in texts)
    for most, least in ((3, 2), (3, 1)):
        for length in LENGTHS:
            counts = [count_passes(prompt, answer, most, least, length) for prompt, answer in texts]
            passes, rows = (sum(column) for column in zip(*counts))
            print(
                f"n-grams of {least} to {most}, drafts of {length:2}: {tokens / passes:.2f} tokens and "
                f"{rows / passes:.2f} rows a pass"
            )


if __name__ == "__main__":
    main()
