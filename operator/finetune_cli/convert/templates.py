"""What LLaMA-Factory calls its chat templates, and which of them have a counterpart.

The names only: a template itself is either ours (`model.chatTemplate` by name), the tokenizer's, or given in a file.
"""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


BY_NAME = ("llama2", "llama3", "chatml", "qwen", "mistral", "gemma", "llava")
"""Templates that LLaMA-Factory and `model.chatTemplate` call the same."""
TOKENIZERS = _names("""
    bailing bailing_v2 breeze chatglm3 cohere dbrx deepseek deepseek3 deepseekcoder deepseekr1 ernie
    ernie_nothink exaone falcon falcon_h1 gemma2 gemma3 gemma4 glm4 glm4_7 glm4_moe glmz1 gpt_oss granite3
    granite4 hunyuan hunyuan_small hy3 hy_dense_1_8b hy_dense_7b index intern2 lfm2 llama4 mimo mimo_v2
    minimax1 minimax2 ministral ministral3 mistral_small moonlight olmo openchat openchat-3.6 opencoder phi
    phi4 phi4_mini phi_small qwen3 qwen3_5 qwen3_5_nothink qwen3_6 qwen3_nothink sailor seed_coder seed_oss
    smollm smollm2 solar starchat telechat2 yi youtu yuan zephyr
""")
"""Templates that repeat what the tokenizers of their models bring along."""
REASONING = _names("""
    deepseekr1 gemma4 glm4_7 glm4_moe glmz1 gpt_oss hy3 mimo mimo_v2 minimax2 qwen3 qwen3_5 qwen3_6 seed_oss
    youtu
""")
"""Of `TOKENIZERS`: those that know thoughts."""
WITHOUT_FUNCTIONS = ("llama2", "codellama", "mistral", "gemma", "llava")
"""Templates of ours that have no form for functions, calls and results."""
SEEING = _names("""
    aeva dots_ocr ernie_vl gemma3n gemma4n glm4_5v glm4v glm_ocr granite3_vision intern_s1 intern_vl keye_vl
    kimi_vl lfm2_vl llava_next llava_next_llama3 llava_next_mistral llava_next_qwen llava_next_video
    llava_next_video_mistral llava_next_video_yi llava_next_yi mimo_vl minicpm_o minicpm_v minicpm_v_4_6
    mllama moss_vl paligemma paligemma_chat pixtral qwen2_audio qwen2_omni qwen2_vl qwen3_omni
    qwen3_omni_nothink qwen3_vl qwen3_vl_nothink video_llava yi_vl youtu_vl
""")
"""Templates of models that see or hear in another way than LLaVA-1.5 does."""
OWN = _names("""
    alpaca chatml_de cpm4 custom default empty fewshot llama2_zh vicuna xuanyuan
""")
"""Templates that no tokenizer brings along."""
