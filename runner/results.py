"""Results of main.py: results.json, report.html, tables, and images of predictions."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dataset import SampleFiles, original_size, read_rgb, read_xyz
from feature_extractors.config import DetectorConfig
from feature_extractors.thresholds import Thresholds
from runner.finished_classes import FOLDER, class_file, read_class, write_class
from runner.preparation import Run, image_files
from runner.settings import applied_flags
from utils.distributed import progress_bar
from utils.records import SampleResult
from utils.reporting.html_report.class_report import ClassReport
from utils.reporting.html_report.report_page import write_report
from utils.reporting.latex import LATEX_NAME, write_latex
from utils.reporting.messages import show
from utils.reporting.results_json import FILE_NAME, origin_of_run, results_record
from utils.reporting.tables import CSV_NAME, append_tables, format_tables, result_line, write_csv
from utils.reporting.visualization import caption, color_scales, save_anomaly_map, save_figure
from utils.scans.json_records import write_record
from utils.scans.organized_pc import valid_mask

logger = logging.getLogger("main")


class Results:
    """Results of a run on a device, written class by class and published by rank 0.

    `inputs` are the run's `input_checksums`. Reports are kept by fit, that is by method and seed, and class.
    """

    def __init__(self, run: Run, inputs: Mapping[str, Mapping[str, str]], device: torch.device) -> None:
        self.run, self.inputs, self.origin = run, inputs, origin_of_run(device)
        self.folders = run.folders(run.settings.output_dir)
        self.flags = {fit: {**run.flags, **applied_flags(config)} for fit, config in run.configs.items()}
        self.exact = run.config.protocol.exact_au_pro
        self.note = table_note(run.config, run.settings.few_shot)
        if len(run.seeds) > 1:
            self.note += f" Mean ± sample standard deviation over the seeds {', '.join(map(str, run.seeds))}."
        self.reports: dict[str, dict[str, ClassReport]] = {fit: {} for fit in run.configs}

    def begin(self) -> list[str]:
        """Return the classes to compute. With --resume, publish the others. Delete files of older runs."""
        logger.info(self.note)
        if self.run.settings.resume:
            self.publish({})
            finished = [name for name in self.inputs if name not in self.missing()]
            folder = self.run.settings.output_dir / FOLDER
            logger.info("--resume: %s finished before, by the files in %s", ", ".join(finished) or "no class", folder)
        for name in self.missing():
            for folder in self.folders.values():
                class_file(folder, name).unlink(missing_ok=True)
        return self.missing()

    def keep(self, name: str, reports: Mapping[str, ClassReport]) -> None:
        """Write the files of a finished class, for --resume and for rank 0."""
        for fit, report in reports.items():
            write_class(self.folders[fit], report, self.flags[fit], self.inputs[name][fit])

    def publish(self, finished: Mapping[str, Mapping[str, ClassReport]]) -> None:
        """Print a line for each newly finished class and fit, and write results.json and report.html again.

        Newly finished classes are those in `finished` and those whose files other groups, or an interrupted run, have
        written. Errors as in `read_class`.
        """
        kept = {name: self._kept(name) for name in self.missing() if name not in finished}
        finished = {**finished, **{name: reports for name, reports in kept.items() if reports}}
        for name, reports in finished.items():
            for fit, report in reports.items():
                self.reports[fit][name] = report
                label = name if len(self.reports) == 1 else f"{name}, {fit}"
                show(result_line(label, report.entry, self.exact))
        if not finished:
            return
        for fit, config in self.run.configs.items():
            of_fit = [self.reports[fit][name] for name in self.inputs if name in self.reports[fit]]
            entries = {each.name: each.entry for each in of_fit}
            record = results_record(sys.argv, self.flags[fit], entries, self.origin)
            write_record(self.folders[fit] / FILE_NAME, record, indent=1)
            note = table_note(config, self.run.settings.few_shot)
            if len(self.run.seeds) > 1:
                note += f" Seed {config.random_state}."
            write_report(self.folders[fit], record, of_fit, note)
        write_csv(self.run.settings.output_dir / CSV_NAME, self._entries())

    def _entries(self) -> dict[str, dict[int | None, dict[str, Any]]]:
        """Published entries of results.json by method, seed and class."""
        entries: dict[str, dict[int | None, dict[str, Any]]] = {}
        for fit, config in self.run.configs.items():
            of_fit = {name: self.reports[fit][name].entry for name in self.inputs if name in self.reports[fit]}
            entries.setdefault(config.method_name, {})[config.random_state] = of_fit
        return entries

    def _kept(self, name: str) -> dict[str, ClassReport]:
        """Reports of a class by fit, from its files; empty if the file of any fit is missing."""
        reports = {}
        for fit, folder in self.folders.items():
            report = read_class(folder, name, self.flags[fit], self.inputs[name][fit])
            if report is None:
                return {}
            reports[fit] = report
        return reports

    def missing(self) -> list[str]:
        """The classes that are not published yet."""
        return [name for name in self.inputs if any(name not in reports for reports in self.reports.values())]

    def finish(self, finished: Mapping[str, Mapping[str, ClassReport]]) -> None:
        """Publish the rest of `finished`, add the tables to those of earlier runs, and print them.

        If no class was tested, there is nothing to tabulate.
        """
        self.publish({name: finished[name] for name in self.missing()})
        settings = self.run.settings
        lines = [""]
        if any(files.test for files in self.run.files.values()):
            methods = self._entries()
            append_tables(settings.output_dir, methods, sys.argv, self.exact, self.note, settings.resume)
            write_latex(settings.output_dir / LATEX_NAME, methods, sys.argv, self.exact, self.note)
            lines += [*format_tables(methods, self.exact, self.note).splitlines(), ""]
        detectors = f", detectors to {settings.save_detector}/" if settings.save_detector else ""
        for line in [*lines, f"written to {settings.output_dir}/{detectors}"]:
            show(line)


def table_note(config: DetectorConfig, few_shot: int | None) -> str:
    """Sentences below every table: backbones, protocol, --few_shot, and a missing UFF."""
    names = config.backbone_names
    if config.rgb_layers is not None and "rgb" in names:
        names["rgb"] += f" (layers {' '.join(map(str, config.rgb_layers))})"
    backbones = ", ".join(f"{modality} {name}" for modality, name in names.items())
    note = f"Backbones: {backbones}. Protocol: {applied_flags(config)['protocol']}."
    if few_shot is not None:
        note += f" Fitted on {few_shot} of the training samples of each class, drawn at random."
    if "fusion" in config.method.banks and not config.use_uff:
        note += " Without --use_uff the fusion bank holds concatenated features, as in the paper's ablation."
    return note


def save_predictions(
    class_name: str,
    files: list[SampleFiles],
    results: list[SampleResult],
    output_dir: Path,
    thresholds: Thresholds | None,
) -> None:
    """Write the anomaly map of each test sample at the size of its ground truth, and a figure of it."""
    predictions = [result.prediction for result in results]
    pixel = None if thresholds is None else thresholds.pixel
    scale = color_scales(predictions, pixel)
    pairs = progress_bar(zip(files, results, strict=True), total=len(files), desc="images", unit="sample")
    for file, result in pairs:
        prediction, plane = result.prediction, result.prediction.anomaly_map.numpy()
        anomaly_map, figure = image_files(output_dir, class_name, file)
        save_anomaly_map(anomaly_map, plane, original_size(file))
        cloud = read_xyz(file) if prediction.bank_maps.keys() - {"rgb"} else None
        severity = None if thresholds is None else thresholds.severity(prediction.score)
        anomalous = None if thresholds is None else prediction.score > thresholds.image
        bank_maps = {bank: bank_map.numpy() for bank, bank_map in prediction.bank_maps.items()}
        valid = None if cloud is None else valid_mask(cloud)
        title, mask = caption(f"{class_name}/{file.path}", severity, anomalous), result.mask.numpy()
        save_figure(figure, title, read_rgb(file), plane, scale, pixel, mask, valid, bank_maps)
