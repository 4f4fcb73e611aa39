"""What main.py leaves in its output folder: predictions, results.json, report.html, tables."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset import SampleFiles, original_size, read_rgb
from feature_extractors.config import DetectorConfig
from feature_extractors.pipeline import SampleResult
from runner.finished_classes import class_file, read_class, write_class
from runner.settings import applied_flags, method_folder
from utils.distributed import progress_bar
from utils.report import append_tables, format_tables, result_line, results_record, write_results
from utils.reporting.html_report.class_report import ClassReport
from utils.reporting.html_report.report_page import write_report
from utils.reporting.visualization import FUSED, color_scale, save_anomaly_map, save_prediction_figure


class Results:
    """The classes of a run, in the process that writes about them.

    Args:
        output_dir: where everything goes, what is a method's own into its `method_folder`.
        configs: of each method.
        inputs: of each class, in the order of the tables, a checksum of what its figures come from beside the flags.
        flags: of the run, for results.json.
        precision: of the networks, as it was chosen.
    """

    def __init__(
        self,
        output_dir: Path,
        configs: Mapping[str, DetectorConfig],
        inputs: Mapping[str, str],
        flags: Mapping[str, Any],
        precision: str,
    ) -> None:
        self.output_dir, self.configs, self.inputs = output_dir, configs, inputs
        self.names = list(inputs)
        self.folders = {method: method_folder(output_dir, configs, method) for method in configs}
        self.flags = {
            method: dict(flags) | applied_flags(config) | {"precision": precision} for method, config in configs.items()
        }
        self.exact = next(iter(configs.values())).protocol.exact_au_pro
        self.reports: dict[str, dict[str, ClassReport]] = {method: {} for method in configs}

    def keep(self, name: str, of_class: Mapping[str, ClassReport]) -> None:
        """Write a finished class into its own files, which no other process writes."""
        for method, report in of_class.items():
            write_class(self.folders[method], report, self.flags[method], self.inputs[name])

    def forget(self, names: Sequence[str]) -> None:
        """Delete what an earlier run kept of classes, so that nothing takes it for this one's."""
        for folder in self.folders.values():
            for name in names:
                class_file(folder, name).unlink(missing_ok=True)

    def kept(self, name: str) -> dict[str, ClassReport]:
        """What was kept of a class, by method; nothing where that of a method is missing.

        Raises:
            InputError: see read_class.
        """
        found = {
            method: read_class(folder, name, self.flags[method], self.inputs[name])
            for method, folder in self.folders.items()
        }
        whole = {method: report for method, report in found.items() if report is not None}
        return whole if len(whole) == len(found) else {}

    def publish(self, finished: Mapping[str, Mapping[str, ClassReport]]) -> None:
        """Print the line of each newly finished class and method, and write results.json and report.html anew."""
        for name, of_class in finished.items():
            for method, report in of_class.items():
                self.reports[method][name] = report
                label = name if len(self.configs) == 1 else f"{name}, {method}"
                print(result_line(label, report.entry, self.exact), flush=True)
        for method, config in self.configs.items():
            reports = [self.reports[method][name] for name in self.names if name in self.reports[method]]
            record = results_record(sys.argv, self.flags[method], {each.name: each.entry for each in reports})
            write_results(self.folders[method], record)
            write_report(self.folders[method], record, reports, table_note(config))

    def missing(self) -> list[str]:
        """The classes that were not published yet."""
        return [name for name in self.names if any(name not in reports for reports in self.reports.values())]

    def finish(self, note: str) -> None:
        """Append the tables to those of earlier runs, and print them."""
        methods = {
            method: {name: reports[name].entry for name in self.names} for method, reports in self.reports.items()
        }
        append_tables(self.output_dir, methods, sys.argv, self.exact, note)
        print(f"\n{format_tables(methods, self.exact, note)}\n\nwritten to {self.output_dir}/")


def table_note(config: DetectorConfig) -> str:
    """What every table says beside the method's name: backbones, protocol, and whether features are fused."""
    backbones = ", ".join(f"{modality} {name}" for modality, name in config.backbone_names.items())
    note = f"Backbones: {backbones}. Protocol: {applied_flags(config)['protocol']}."
    if "fusion" in config.method.banks and not config.use_uff:
        note += " Without --use_uff the fusion bank holds the concatenated features, unfused (the paper's ablation)."
    return note


def save_predictions(class_name: str, files: list[SampleFiles], results: list[SampleResult], output_dir: Path) -> None:
    """Write the anomaly map of each test sample at the size of its ground truth, and its picture."""
    predictions = [result.prediction for result in results]
    scale = {FUSED: color_scale([prediction.anomaly_map.numpy() for prediction in predictions])}
    for bank in predictions[0].bank_maps:
        scale[bank] = color_scale([prediction.bank_maps[bank].numpy() for prediction in predictions])
    pairs = progress_bar(zip(files, results, strict=True), total=len(files), desc="pictures", unit="sample")
    for file, result in pairs:
        prediction, plane = result.prediction, result.prediction.anomaly_map.numpy()
        save_anomaly_map(output_dir / "anomaly_maps" / class_name / f"{file.path}.tiff", plane, original_size(file))
        save_prediction_figure(
            output_dir / "pred_maps" / class_name / f"{file.path.removeprefix('test/')}.png",
            read_rgb(file),
            result.mask.numpy(),
            {bank: bank_map.numpy() for bank, bank_map in prediction.bank_maps.items()},
            plane,
            scale,
            f"{class_name}/{file.path}  score {prediction.score:.4g}",
        )
