"""Makes `peft_prompt/`: PEFT's prompt tuning on `families/llama_gqa_tied`.

Run with the extra `parity`, after make_families.py:  python tests/goldens/make_peft_prompt.py

The directory is what PEFT saves, with `expected.npz`: tokens, weights of the labels, PEFT's float32 logits of the
tokens (those of its virtual tokens left out), the mean cross-entropy and its gradient in the prompt, and the greedy
continuation of the first row by transformers from `inputs_embeds`.
"""

import pathlib
import shutil

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
BASE, OUT = HERE / "families" / "llama_gqa_tied", HERE / "peft_prompt"
PROMPT, LENGTH, BATCH, VOCAB, NEW = 4, 12, 2, 128, 8

if __name__ == "__main__":
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(5)
    vectors = model.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        vectors.copy_(0.3 * torch.randn(vectors.shape, generator=generator))
    tokens = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    weights = (torch.rand((BATCH, LENGTH - 1), generator=generator) < 0.6).float()
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, PROMPT:]
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = (weights * nll).sum() / weights.sum()
    loss.backward()
    embeds = torch.cat([vectors.detach()[None], base.get_input_embeddings()(tokens[:1])], dim=1).detach()
    greedy = base.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    shutil.rmtree(OUT, ignore_errors=True)
    model.save_pretrained(OUT)
    (OUT / "README.md").unlink(missing_ok=True)
    file = OUT / "adapter_config.json"
    file.write_text(file.read_text().replace(str(BASE), "tests/goldens/families/llama_gqa_tied"))
    np.savez_compressed(
        OUT / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        weights=weights.numpy(),
        logits=logits.detach().numpy(),
        loss=np.float64(loss.item()),
        gradient=vectors.grad.numpy(),
        greedy=greedy[0].numpy().astype(np.int32),
    )
    print(loss.item(), greedy.tolist())
