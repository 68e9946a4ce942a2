"""One evaluation: questions are gathered and asked, answers scored from their files, results told to people."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.contract import Job
from components.evaluate import contamination, exams, report
from components.evaluate.answering import BLANK, RIGHT, WRONG, Answer, Ask, answer_all, to_jsonl
from components.evaluate.exams import Exam
from components.evaluate.heldout_scores import Answered, metrics
from components.evaluate.judge_run import reviews
from components.evaluate.pictures import Picture
from components.evaluate.questions import (
    HeldOutQuestion,
    exam_digest,
    heldout_rows,
    read_questions,
    wrong_pictures,
)
from components.evaluate.report import Sample
from components.evaluate.settings import HELD_OUT_EXAM, EvaluateSettings, ExamSettings
from components.scoring import bootstrap
from components.scoring.benchmarks import Files, Scored, Unit, find
from components.scoring.benchmarks.vqa import is_match
from components.scoring.outcomes import CONTAMINATION, files_note, without
from llava.errors import RefusedInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLE = "example.png"
"""A picture of the evaluation, for whoever wants to ask the model about one."""
_HELD_OUT_VERSION = "3"
"""How held-out questions are put and judged: raised where their scores compare no more with those before."""
_RIGHT_OR_WRONG = ("vqa", "pope", "scienceqa")


class Evaluation:
    """What is asked, what was answered, and what came of it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.settings: EvaluateSettings = job.settings
        self.model, self.dataset = job.inputs["model"], job.inputs["questions"]
        self.asks: list[Ask] = []
        self.pictures: dict[str, set[str]] = {}
        """Questions of each exam that show a picture (by hash): exam/hash -> names of units."""
        self.questions: list[HeldOutQuestion] = []
        self.notes: dict[str, Any] = {}
        self.outcomes: dict[str, Scored] = {}
        self.blank: dict[str, Scored] = {}
        """As `outcomes`, with blank pictures."""
        self.samples: list[Sample] = []
        self.remarks: list[str] = []
        self.heldout: list[Answered] = []
        self.left_out: dict[str, set[str]] = {}
        if heldout_rows(self.dataset.folder):
            self._open_heldout()
        self.exams = [exams.open_exam(one, self._place(one)) for one in self.settings.benchmarks]
        for exam in self.exams:
            self._open(exam)

    def ask(self) -> None:
        """Look for pictures that the model was trained on, then have every question answered."""
        self._look_for_contamination()
        self.answers: dict[str, Answer] = answer_all(
            self.model,
            self.asks,
            self.job.folder,
            batch_size=self.settings.batch_size,
            workers=self.settings.workers,
            gpu=self.settings.gpu,
            before_write=self.job.lease.check,
            say=self.job.say,
        )

    def score(self) -> None:
        """The scores of each exam from its files, as `llava score` gives them."""
        if self.questions:
            self._score_heldout()
        for exam in self.exams:
            self._score(exam)
        self.job.notes["exams"] = self.notes

    def report(self) -> None:
        """Tables, charts and samples, in the artifact and in MLflow."""
        job = self.job
        models = {"model": self.outcomes} | ({"with blank pictures": self.blank} if self.blank else {})
        samples = report.pick(self.samples)
        asked = {name: f"{note['n']:,} (exam {note['digest'][:16]})" for name, note in self.notes.items()}
        facts = {"model": self.model.uri, "questions": self.dataset.uri} | {
            f"asked of {k}": v for k, v in asked.items()
        }
        _publish(job, "report.md", report.page(facts, models, self._kept(), self.remarks, samples))
        _publish(job, "benchmarks.png", report.score_chart(models))
        by_key = {ask.key: ask.picture for ask in self.asks}
        pictures = [by_key[_key(*sample.index)] for sample in samples]
        opened = [None if picture is None else picture.open() for picture in pictures]
        _publish(job, "samples.png", report.samples_figure(samples, opened))
        if self.heldout:
            _publish(job, "by_kind.png", report.bar_chart(self._kept()))
            job.run.table(report.table(self._kept()), "eval/by_kind.json")
            job.run.table(report.answers_table(self.heldout), "eval/answers.json")
        job.run.table(report.scores_table(models), "eval/benchmarks.json")
        seen = [index for index, picture in enumerate(opened) if picture is not None]
        shown = next((index for index in seen if samples[index].answers[RIGHT][1]), seen[0] if seen else None)
        if shown is not None and (picture := opened[shown]) is not None:
            picture.save(job.scratch / EXAMPLE)
            job.folder.upload(job.scratch / EXAMPLE, EXAMPLE)
            job.notes["example"] = {
                "picture": EXAMPLE,
                "question": samples[shown].question,
                "expected": samples[shown].expected,
            }
        for name, scored in self.outcomes.items():
            headline = find(scored.benchmark).headline
            with_blank = (
                f"; {self.blank[name].scores[headline]:.4g} with blank pictures" if name in self.blank else ""
            )
            job.say(f"{name}: {headline} {scored.scores[headline]:.4g} of {scored.n:,} questions{with_blank}")

    def _open_heldout(self) -> None:
        settings = self.settings
        self.questions, skipped = read_questions(self.dataset.folder, settings.limit, settings.seed)
        wrong = wrong_pictures(self.questions, settings.seed)
        terms = {
            "benchmark": HELD_OUT_EXAM,
            "max_new_tokens": settings.max_new_tokens,
            "version": _HELD_OUT_VERSION,
        }
        digest = exam_digest(self.questions, wrong, terms)
        for reason, count in sorted(skipped.items()):
            self.job.say(f"{count:,} held-out rows are no question: {reason}")
        self.job.notes.update(questions=digest, rows=len(self.questions), skipped=skipped)
        self.job.run.dataset("questions asked", digest, self.dataset.uri)
        self.wrong = [self.questions[other] for other in wrong]
        self.notes[HELD_OUT_EXAM] = {"benchmark": "vqa", "digest": digest, "folder": ""}
        for number, (question, other) in enumerate(zip(self.questions, self.wrong, strict=True)):
            self._seen(HELD_OUT_EXAM, question.picture, question.id)
            self.asks.append(
                Ask(_key(HELD_OUT_EXAM, number), question.question, settings.max_new_tokens,
                    Picture(question.picture, question.image), blank=True,
                    wrong=Picture(other.picture, other.image), expected=question.expected)
            )  # fmt: skip

    def _open(self, exam: Exam) -> None:
        one = exam.settings
        self.job.run.dataset(f"benchmark {one.title}", exam.digest, next(iter(one.paths.values())))
        self.notes[one.title] = {
            "benchmark": one.benchmark,
            "digest": exam.digest,
            "folder": f"exams/{one.title}",
        }
        for number, item in enumerate(exam.items):
            if item.picture is not None:
                self._seen(one.title, item.picture.sha256, item.unit)
            self.asks.append(
                Ask(_key(one.title, number), item.prompt, one.answer_length, item.picture, one.blank_images)
            )

    def _look_for_contamination(self) -> None:
        job, how = self.job, self.settings.contamination
        if how == "off":
            return
        hashes = {key.partition("/")[2] for key in self.pictures}
        found = contamination.look(self.model, [job.workspace.store], hashes)
        if found.unknown and how == "exclude":
            raise RefusedInput(
                f"evaluate.contamination=exclude: {len(found.unknown)} of the artifacts that {self.model.uri} comes "
                f"from are gone (first: {found.unknown[0][:16]}): choose report, or train it again"
            )
        by_exam: dict[str, set[str]] = {}
        for key, units in self.pictures.items():
            name, _, sha = key.partition("/")
            if sha in found.pictures:
                by_exam.setdefault(name, set()).update(units)
        job.folder.write(CONTAMINATION, _json({
            "looked_through": found.datasets,
            "not_found": found.unknown,
            "pictures": sorted(found.pictures),
            "questions": {name: sorted(units) for name, units in by_exam.items()},
        }))  # fmt: skip
        verb = "are left out of the scores" if how == "exclude" else "count in the scores"
        if not found.datasets:
            self._remark("contamination: nothing is known of the data that the model was trained on")
        elif not found.pictures:
            self._remark(f"contamination: none of {len(hashes):,} pictures is in the training data")
        else:
            said = ", ".join(f"{len(units):,} of {name}" for name, units in by_exam.items())
            self._remark(
                f"contamination: {len(found.pictures):,} of {len(hashes):,} pictures are in the training data; their "
                f"questions ({said}) {verb}; {CONTAMINATION} names them"
            )
        if found.unknown and found.datasets:
            self._remark(
                f"contamination: {len(found.unknown)} artifacts that the model comes from are gone, unseen"
            )
        job.metrics["eval/contamination/pictures/found"] = float(len(found.pictures))
        if how == "exclude":
            self.left_out = by_exam

    def _score_heldout(self) -> None:
        answers = [self.answers[_key(HELD_OUT_EXAM, number)] for number in range(len(self.questions))]
        self.heldout = [
            Answered(
                id=question.id,
                kind=question.kind,
                question=question.question,
                expected=question.expected,
                wrong_image_of=other.id,
                answers=answer["answers"],
                correct={key: is_match(text, question.expected) for key, text in answer["answers"].items()},
                loss=answer["loss"],
                tokens=answer["tokens"],
            )
            for question, other, answer in zip(self.questions, self.wrong, answers, strict=True)
        ]
        kept = self._kept()
        if not kept:
            raise RefusedInput(
                f"every held-out picture of {self.dataset.uri} is in the training data: nothing is left"
            )
        self.job.metrics.update(metrics(kept, HELD_OUT_EXAM))
        if "eval/loss" not in self.job.metrics:
            self.job.say("the model's chat template is none of ours: held-out loss is not measured")
        path = self.job.scratch / "answers.jsonl"
        path.write_bytes(to_jsonl(self.heldout))
        self.job.folder.upload(path, path.name)
        self._found(HELD_OUT_EXAM, Files(answers=path))
        blank_path = self.job.scratch / "blank.jsonl"
        blank_path.write_bytes(
            to_jsonl([row | {"answers": {RIGHT: row["answers"][BLANK]}} for row in self.heldout])
        )
        self.blank[HELD_OUT_EXAM] = self._clean(HELD_OUT_EXAM, find("vqa").score(Files(answers=blank_path)))
        by_kind: dict[str, list[Sample]] = {}
        for number, row in enumerate(self.heldout):
            answers_ = {one: (row["answers"][one], row["correct"][one]) for one in (RIGHT, BLANK, WRONG)}
            by_kind.setdefault(row["kind"], []).append(
                Sample(row["kind"], row["question"], row["expected"], answers_, (HELD_OUT_EXAM, number))
            )
        self.samples += [sample for kind in sorted(by_kind) for sample in by_kind[kind]]

    def _score(self, exam: Exam) -> None:
        one, index = exam.settings, self._place(exam.settings)
        given = [self.answers[_key(one.title, number)]["answers"] for number in range(len(exam.items))]
        model, judged = self.model.digest[:16], {}
        files = exams.answered(exam, [texts[RIGHT] for texts in given], model, index)
        if one.judge is not None:
            files = reviews(self.job, exam, files, index)
        if one.benchmark != "llava-bench" or files.reviews:
            judged[RIGHT] = self._found(one.title, files)
        else:
            self.notes[one.title] |= {"n": len(exam.items), "scores": {}}
            self._remark(f"{one.title}: answered and not scored, since no judge is named; see `llava score`")
        if one.blank_images:
            files = exams.answered(exam, [texts[BLANK] for texts in given], model, index, "blank-")
            if one.benchmark != "llava-bench":
                scored = find(one.benchmark).score(files)
                judged[BLANK] = scored
                self.blank[one.title] = self._clean(one.title, scored)
                self._metrics(f"{one.title}/{BLANK}", self.blank[one.title])
        for path in sorted(index.iterdir()):
            self.job.folder.upload(path, f"exams/{one.title}/{path.name}")
        self._sample(exam, given, {one_: exams.units(exam, scored) for one_, scored in judged.items()})

    def _found(self, name: str, files: Files) -> Scored:
        """Score, and tell manifest and MLflow; gives the outcome over all questions."""
        every = find(self.notes[name]["benchmark"]).score(files)
        scored = self.outcomes[name] = self._clean(name, every)
        intervals = bootstrap.intervals(scored.sums, scored.formula)
        self.notes[name] |= {
            "files": files_note(files),
            "n": scored.n,
            "failed": scored.failed,
            "scores": {key: _finite(value) for key, value in scored.scores.items()},
            "intervals": {key: [_finite(end) for end in ends] for key, ends in intervals.items()},
            "remarks": list(scored.remarks),
            "excluded": bool(self.left_out.get(name)),
        }
        for remark in scored.remarks:
            self._remark(f"{name}: {remark}")
        if name != HELD_OUT_EXAM:
            self._metrics(name, scored)
            self.job.metrics[f"eval/{_metric(name)}/questions/n"] = float(scored.n)
            self.job.metrics[f"eval/{_metric(name)}/questions/failed"] = float(scored.failed)
        return every

    def _clean(self, name: str, scored: Scored) -> Scored:
        """Without the questions that are left out."""
        clean = without(scored, self.left_out.get(name, ()))
        if not clean.units:
            raise RefusedInput(f"{name}: every picture is in the training data: nothing is left to score")
        return clean

    def _metrics(self, name: str, scored: Scored) -> None:
        named = {f"eval/{_metric(name)}/{_metric(key)}": value for key, value in scored.scores.items()}
        self.job.metrics.update({key: value for key, value in named.items() if math.isfinite(value)})

    def _sample(self, exam: Exam, given: list[dict[str, str]], judged: Mapping[str, list[Unit]]) -> None:
        """A benchmark's answers, judged as its scores judged them: `judged` are the units by condition."""
        for number, (item, texts) in enumerate(zip(exam.items, given, strict=True)):
            units = {condition: each[number] for condition, each in judged.items()}
            expected = units[RIGHT].expected if RIGHT in units else ""
            answers = {
                one: (
                    text,
                    units[one].value >= 0.5
                    if one in units and exam.settings.benchmark in _RIGHT_OR_WRONG
                    else None,
                )
                for one, text in texts.items()
            }
            name = exam.settings.title
            self.samples.append(Sample(name, item.prompt, expected, answers, (name, number)))

    def _kept(self) -> list[Answered]:
        gone = self.left_out.get(HELD_OUT_EXAM, set())
        return [row for row in self.heldout if row["id"] not in gone]

    def _seen(self, exam: str, sha256: str, unit: str) -> None:
        self.pictures.setdefault(f"{exam}/{sha256}", set()).add(unit)

    def _remark(self, text: str) -> None:
        self.remarks.append(text)
        self.job.say(text)

    def _place(self, exam: ExamSettings) -> Path:
        return self.job.scratch / "exams" / exam.title


def _key(exam: str, number: int) -> str:
    return f"{exam}/{number:07d}"


def _metric(name: str) -> str:
    """MLflow takes only these characters in a metric's name."""
    return re.sub(r"[^\w.\-/ ]", "_", name)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def _publish(job: Job, name: str, content: str | Figure) -> None:
    """Into the artifact and into MLflow."""
    if isinstance(content, str):
        job.folder.write(name, content.encode())
        job.run.text(content, f"eval/{name}")
        return
    path = job.scratch / name
    with warnings.catch_warnings():
        # Answers may hold letters that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph")
        content.savefig(path, dpi=110)
    job.folder.upload(path, name)
    job.run.artifact(path, "eval")
