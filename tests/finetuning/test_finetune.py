"""The recipe of a fine-tuning."""

from mlx_slm.config.schema import Recipe
from mlx_slm.finetuning.finetune import choose_recipe


def test_recipes_of_the_paper(config):
    chosen = [choose_recipe(config.finetuning, tokens, False) for tokens in (250_000, 10**6, 8 * 10**6, 10**7, 10**9)]
    assert [(r.rate, r.steps) for r in chosen] == [(1 / 3, 2000), (1 / 3, 2000), (1, 4000), (1, 30_000), (1, 30_000)]
    assert choose_recipe(config.finetuning, 10**6, scratch=True) == Recipe(tokens=10**6, rate=1, steps=2000)
