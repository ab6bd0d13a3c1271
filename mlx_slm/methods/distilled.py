"""SLM-d (section 2.2): a small model that is fine-tuned on a domain and learns from a large one that was, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mlx_slm.config.schema import Config, Recipe
from mlx_slm.errors import SlmError
from mlx_slm.experts.bundle import find_source
from mlx_slm.experts.experts import has_experts
from mlx_slm.export.model import weights_of
from mlx_slm.export.start import Pretrained
from mlx_slm.finetuning.domain import DomainSet
from mlx_slm.finetuning.finetune import Finetuning
from mlx_slm.methods.base import Method, Models, Rows
from mlx_slm.methods.costs import Cost, Spending
from mlx_slm.methods.plain import Large, Small
from mlx_slm.methods.requests import Specialisation
from mlx_slm.methods.starts import Start, find_published
from mlx_slm.models.shape import Shape
from mlx_slm.models.transformer import Transformer
from mlx_slm.project import Project
from mlx_slm.training.distillation import Distillation
from mlx_slm.training.runs import Run
from mlx_slm.training.step import Objective, training_bytes


@dataclass(frozen=True)
class WithTeacher(Start):
    start: Start
    """What the student starts from."""
    teacher_name: str
    """As it was asked for."""
    teacher: Run | Pretrained
    tuned: Run | None = None
    """The teacher once it is fine-tuned on the domain."""

    @property
    def tuned_teacher(self) -> Run:
        assert self.tuned is not None
        return self.tuned

    @property
    def what(self) -> str:
        return f"{self.start.what} with the teacher {self.tuned_teacher.name}"

    @property
    def origin(self) -> dict | str:
        return self.start.origin

    @property
    def published(self) -> dict | None:
        return self.start.published

    def rate(self, config: Config, recipe: Recipe) -> float:
        return self.start.rate(config, recipe)

    def shape(self, config: Config, vocab_size: int, context_length: int) -> Shape:
        if isinstance(self.teacher, Pretrained):
            self.teacher.fitted(context_length)
        if (rows := self.teacher.shape.vocab_size) < vocab_size:
            raise SlmError(
                f"--teacher {self.teacher_name}: its embedding has {rows:,} rows, the tokenizer {vocab_size:,} tokens: "
                "a teacher knows every token of its student"
            )
        return self.start.shape(config, vocab_size, context_length)

    def runs(self) -> list[Run]:
        return [*self.start.runs(), *([self.teacher] if isinstance(self.teacher, Run) else [])]

    def ready(self, tune: Callable[[str, Run | Pretrained], Run]) -> WithTeacher:
        return replace(self, tuned=tune(self.teacher_name, self.teacher))

    def inputs(self, config: Config) -> dict:
        tuned = self.tuned_teacher
        teacher = {"run": tuned.name, "step": tuned.weights_step(), "identity": tuned.identity}
        return {"teacher": teacher, "distillation": config.distillation.model_dump(mode="json")}

    def train(self, project: Project, run: Run, job: Finetuning, domain: DomainSet) -> None:
        settings, shape = project.config.distillation, self.tuned_teacher.shape
        if settings.a < 1:
            model = Transformer(shape)
            model.update(weights_of(project.workspace, self.tuned_teacher))
            job = replace(
                job,
                objective=Objective(Distillation(model, settings.a, settings.tau)),
                flops_per_token=job.flops_per_token + shape.forward_flops_per_token,
                extra_bytes=4 * shape.num_parameters,
            )
        self.start.train(project, run, job, domain)


class Distilled(Method):
    name, label, color = "d", "SLM-d", "C4"
    summary = "small model that learns from a large one"
    rows = Rows.NONE
    other_budget = "teacher_budget"

    def claims(self, request: Specialisation) -> bool:
        return request.teacher is not None

    def start(self, project: Project, request: Specialisation, source: Run | Pretrained | None) -> Start:
        if request.teacher is None:
            return super().start(project, request, source)
        if isinstance(source, Run) and has_experts(source):
            raise SlmError(
                "--teacher and an expert of a network do not go together: give --from a run of a single model"
            )
        published = find_published(project, request.teacher, "--teacher")
        teacher = published or find_source(project.workspace, request.teacher)
        return WithTeacher(self.name, super().start(project, request, source), request.teacher, teacher)

    def cost(self, spending: Spending) -> Cost:
        rates = spending.rates
        teacher = spending.tokens(Large.name) * rates.llm
        return Cost(spending.generic_hours, teacher + spending.tokens(self.name) * (rates.slm + rates.llm_forward))

    def memory(self, models: Models) -> float:
        recompute = models.config.training.recompute_layers is not False
        small, large = (training_bytes(shape, 1, recompute) for shape in (models.small, models.large))
        return max(large, small + 4 * models.large.num_parameters)

    def pretrained(self, budget: int | None, other_budget: int | None) -> dict[str, int]:
        return {Small.name: budget or 0, Large.name: other_budget or 0}

    def specialisation(self, config: Config, starts: list[str]) -> dict:
        return {"teacher": starts[1]}
