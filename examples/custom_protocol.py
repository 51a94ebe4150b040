"""A protocol of one's own: two sides argue at once, without hearing each other; a judge hears both.

Runs anywhere: the model is tiny and random, so the words are noise. With a real one, only
`tiny_model()` changes.
"""

import string
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fork_attn import reason


@dataclass(frozen=True)
class Debate(reason.Protocol):
    """Each side is a thread; the join takes over the KV of both, so nothing is read again."""

    name: str = "debate"
    sides: tuple[str, ...] = ("For:", "Against:")
    length: int = 24

    def run(self, root: reason.Thread) -> reason.Script:
        threads = yield from root.fork(len(self.sides), labels=self.sides)
        for thread, side in zip(threads, self.sides, strict=True):
            thread.inject(f"\n{side} ")
        writing = [thread.write(max_tokens=self.length) for thread in threads]
        yield from reason.together(writing)  # in the same batches
        yield from root.join(threads, position="max", label="verdict")
        root.inject("\nVerdict: ")
        yield from root.write(max_tokens=self.length)


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama that reads and writes single characters."""
    vocab = {char: i for i, char in enumerate("#" + string.ascii_letters + " \n:?.")}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="#"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocab), "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=0)).eval()
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main() -> None:
    model, tokenizer = tiny_model()
    trace = reason.generate(model, tokenizer, "Is this a good idea?", protocol=Debate())
    trace.show()
    assert [t.label for t in trace.threads] == ["root", "For:", "Against:", "verdict"]
    assert trace.critical_path_tokens <= 48 and trace.threads[3].parents == (0, 1, 2)


if __name__ == "__main__":
    main()
