from __future__ import annotations

import hashlib

import pytest
from log_samples import CODE, SEPARATOR, a_log, expected_rows, real_logs, val_line

from nanorun.records.importers import llmc, modded_nanogpt, nanogpt
from nanorun.records.logs import LoggedPoint, LoggedRun

PIPES = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 570.195.03             Driver Version: 570.195.03     CUDA Version: 12.8     |
|-----------------------------------------+------------------------+----------------------+
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:8D:00.0 Off |                    0 |
| N/A   30C    P0            116W /  700W |    1183MiB /  81559MiB |      2%      Default |
|   1  NVIDIA H100 80GB HBM3          Off |   00000000:8E:00.0 Off |                    0 |
| N/A   30C    P0            116W /  700W |    1183MiB /  81559MiB |      2%      Default |
|    0   N/A  N/A           17198      C   /home/ubuntu/venv/bin/python3          1174MiB |
"""
NO_PIPES = """\
GPU Name                      Temp  Power      Mem Used        Mem Total       Util
0   NVIDIA H100 80GB HBM3     35    117        6340            81559           0     %
1   NVIDIA H100 80GB HBM3     48    120        2029            81559           1     %
"""
BY_UUID = """\
GPU 0: NVIDIA H200 (UUID: GPU-b801c947-42e3-78e7-9453-864bf831c809)
GPU 1: NVIDIA H200 (UUID: GPU-a38acb08-b2f4-b80a-c7e3-83e47ca9df92)
"""


def runs_in(text: str, importer=modded_nanogpt) -> list[LoggedRun]:
    return importer.read(text.splitlines(keepends=True), "log.txt")


def one_run(text: str, importer=modded_nanogpt) -> LoggedRun:
    (run,) = runs_in(text, importer)
    return run


def with_header(header: str) -> LoggedRun:
    return one_run(a_log(header=header))


def test_every_run_of_the_real_logs_reads_as_expected():
    found = {}
    for name, content in real_logs().items():
        importer = llmc if name.startswith("llmc") else modded_nanogpt
        for run in importer.read(content.decode().splitlines(keepends=True), name):
            found[name, run.run] = run
    wanted = expected_rows()
    assert len(wanted) == len(found) == 39
    for row in wanted:
        run = found[row["file"], int(row["run"])]
        said = {
            "first_val_step": run.points[0].step,
            "last_val_step": run.points[-1].step,
            "total_steps": run.total_steps,
            "last_val_loss": run.final_val_loss,
            "last_train_seconds": run.train_seconds,
            "n_val_points": len(run.points),
        }
        assert said == {key: float(row[key]) if row[key] else None for key in said}, row


def test_what_is_odd_about_the_real_logs_is_told():
    def read(name: str) -> LoggedRun:
        return modded_nanogpt.read(real_logs()[name].decode().splitlines(keepends=True), name)[0]

    assert any(
        "set back at step 11, from 30.469 s to 0.142 s" in n for n in read("ms_clock_restart.txt").notes
    )
    assert any("resumed" in note for note in read("resumed_probe.stdout").notes)
    assert any("counts compilation: about 42 s" in note for note in read("seconds_twenty_runs.txt").notes)
    assert any("before the clock starts" in note for note in read("ms_one_gpu.txt").notes)
    assert not read("ms_truncated.txt").complete
    assert not read("seconds_extra_keys.txt").complete
    assert read("ms_warmup.txt").complete
    assert set(read("seconds_two_losses.txt").other_losses) == {"val_avg_loss", "val_ema_loss"}
    assert read("seconds_two_losses.txt").other_losses["val_ema_loss"][-1] == (2900, 3.27277)


def test_the_suffix_says_the_unit_of_the_time():
    assert one_run(val_line(300, 3.2, "231445ms")).train_seconds == 231.445
    assert one_run(val_line(300, 3.2, "231.445s")).train_seconds == 231.445
    odd = one_run(val_line(300, 3.2, "231445"))
    assert odd.train_seconds is None
    assert any("'231445'" in note for note in odd.notes)


def test_keys_may_stand_in_any_order_and_unknown_ones_are_passed_over():
    line = "step:5/5 ema_beta:0.3 train_time:2.5s val_loss:3.1 handoff:none extrap_rel:1.2e+05\n"
    assert one_run(line).points == (LoggedPoint(5, 2.5, 3.1),)
    assert one_run(val_line(5, 3.1, "2.5s").replace("10.00ms", "nanms")).points == (LoggedPoint(5, 2.5, 3.1),)


def test_a_line_that_only_holds_a_step_is_no_reading():
    noise = (
        "tailavg step:200 tau:25 val_loss:3.1\nloaded step:200/300 val_loss:9.9\n step:200/300 val_loss:8.8\n"
    )
    noise += "step:200 path:/x val_loss:7.7\nstep:2x/300 val_loss:6.6\n"
    run = one_run(val_line(100, 3.5) + noise + val_line(300, 3.2))
    assert [point.step for point in run.points] == [100, 300]


def test_an_echo_of_earlier_lines_begins_no_run_and_changes_none():
    lines = [
        val_line(step, loss, f"{step}s") for step, loss in ((0, 9.0), (100, 4.0), (200, 3.5), (300, 3.2))
    ]
    echoed = one_run("".join(lines) + lines[1] + lines[3])
    assert echoed.points == one_run("".join(lines)).points
    assert echoed.notes == one_run("".join(lines)).notes
    doubled = one_run("".join(line * 2 for line in lines))
    assert doubled.points == echoed.points


def test_a_step_read_again_with_other_numbers_keeps_the_first_and_says_so():
    run = one_run(val_line(100, 4.0) + val_line(200, 3.5) + val_line(200, 3.4) + val_line(300, 3.2))
    assert run.points[1].val_loss == 3.5
    assert any("step 200 is read again with other numbers" in note for note in run.notes)


def test_a_new_run_begins_at_or_below_the_first_step_of_the_run_and_only_there():
    first = val_line(100, 4.0) + val_line(300, 3.2)
    assert [len(run.points) for run in runs_in(first + val_line(100, 4.1) + val_line(300, 3.1))] == [2, 2]
    assert [len(run.points) for run in runs_in(first + val_line(50, 4.1))] == [2, 1]
    assert [len(run.points) for run in runs_in(first + val_line(200, 3.5))] == [3]


def test_training_steps_begin_runs_of_their_own_kind():
    def a_run(loss: float) -> str:
        trained = "".join(f"step:{step}/300 train_time:{step}s step_avg:1ms\n" for step in range(1, 150))
        return trained + val_line(150, loss) + "step:151/300 train_time:160s step_avg:1ms\n"

    runs = runs_in(a_run(4.0) + a_run(3.9))
    assert [(run.final_val_loss, run.last_step, run.complete) for run in runs] == [
        (4.0, 151, False),
        (3.9, 151, False),
    ]


def test_a_validation_before_the_declared_last_step_is_incomplete():
    assert not one_run(val_line(0, 9.0) + val_line(299, 3.2)).complete
    assert one_run(val_line(0, 9.0) + val_line(300, 3.2)).complete


@pytest.mark.parametrize(
    ("header", "gpu"),
    [(PIPES, "NVIDIA H100 80GB HBM3"), (NO_PIPES, "NVIDIA H100 80GB HBM3"), (BY_UUID, "NVIDIA H200")],
)
def test_listed_gpus_are_counted_and_the_world_size_is_only_implied(header, gpu):
    machine = with_header(header).machine
    assert (machine.gpu, machine.n_gpus, machine.world_size, machine.world_size_is_implied) == (
        gpu,
        2,
        2,
        True,
    )
    twice = with_header(header + header).machine
    assert twice == machine


@pytest.mark.parametrize(
    ("line", "gpu", "size"),
    [
        ("Running on device_name=NVIDIA L40S with world_size=8", "NVIDIA L40S", 8),
        (
            "Running PyTorch 2.7.1+cu128 compiled for CUDA 12.8 on NVIDIA H800      with world_size 4",
            "NVIDIA H800",
            4,
        ),
        ("command=torchrun --standalone --nproc_per_node=4 train.py --seed 7", "NVIDIA H200", 4),
    ],
)
def test_a_stated_world_size_goes_before_the_listed_gpus(line, gpu, size):
    machine = with_header(f"{BY_UUID}{line}\n").machine
    assert (machine.gpu, machine.n_gpus, machine.world_size, machine.world_size_is_implied) == (
        gpu,
        2,
        size,
        False,
    )


def test_processes_per_node_are_no_world_size_where_there_may_be_more_nodes():
    assert with_header("command=torchrun --nnodes 2 --nproc_per_node=4 train.py\n").machine.world_size is None


def test_devices_of_several_kinds_are_all_named():
    mixed = BY_UUID.replace("GPU 1: NVIDIA H200", "GPU 1: NVIDIA L4")
    assert with_header(mixed).machine.gpu == "NVIDIA H200 + NVIDIA L4"


def test_driver_torch_and_both_forms_of_peak_memory_are_read():
    text = a_log(header=PIPES + "Running pytorch 2.6.0.dev20241203+cu124 compiled for CUDA 12.4\n")
    run = one_run(text + "peak memory allocated: 32826 MiB reserved: 47960 MiB\n")
    assert (run.machine.driver, run.machine.torch) == ("570.195.03", "2.6.0.dev20241203+cu124")
    assert run.machine.peak_memory_mib == 32826
    assert one_run(text + "peak memory consumption: 34239 MiB").machine.peak_memory_mib == 34239
    assert one_run(text).machine.peak_memory_mib is None


@pytest.mark.parametrize(
    "line",
    [
        "Using seed=10",
        "=== seed 10 start 2026-05-18T15:03:48+00:00 ===",
        "command=torchrun x.py --seed 10",
        "trial:1/25 seed:10",
        "seed=10",
    ],
)
def test_the_seed_is_read_where_the_log_says_one(line):
    assert with_header(f"{line}\n").seed == 10
    assert (
        with_header("Using checkpoint_prefix=full_seed10_x\n=== seed 10 exit_status=0 end ===\n").seed is None
    )


def test_each_run_of_a_batch_has_its_own_seed_and_peak_memory():
    def part(seed: int, loss: float, peak: int) -> str:
        peak_line = f"peak memory allocated: {peak} MiB reserved: 9 MiB\n"
        return f"=== seed {seed} start now ===\n{val_line(0, 9.0)}{val_line(300, loss)}{peak_line}"

    runs = runs_in(BY_UUID + part(2, 3.2, 100) + part(3, 3.1, 101))
    assert [(run.seed, run.machine.peak_memory_mib, run.machine.gpu) for run in runs] == [
        (2, 100, "NVIDIA H200"),
        (3, 101, "NVIDIA H200"),
    ]


@pytest.mark.parametrize(
    ("line", "date"),
    [
        ("Wed Dec 11 10:36:50 2024       ", "2024-12-11"),
        ("Sat Jan  3 10:36:50 2026", "2026-01-03"),
        ("Run UTC timestamp=2026-05-25T00:53:53Z", "2026-05-25"),
        ("batch_start=2026-05-18T15:03:48+00:00", "2026-05-18"),
        ("Fri Feb 31 10:36:50 2024", None),
        ("batch_start=2026-13-18T15:03:48+00:00", None),
    ],
)
def test_the_day_is_read_where_the_log_says_one(line, date):
    assert with_header(f"{line}\n").date == date


def test_embedded_code_is_kept_as_it_is_and_hashed():
    run = one_run(a_log())
    assert run.source == CODE
    assert run.source_sha256 == hashlib.sha256(CODE.encode()).hexdigest()
    between_two = one_run(f"{SEPARATOR}\n{a_log()}")
    assert between_two.source_sha256 == run.source_sha256


def test_a_header_or_a_word_that_code_was_left_out_is_no_code():
    run = one_run(a_log(code="(the source code that the log held here was left out)\n"))
    assert run.source is None
    assert run.source_sha256 is None
    assert one_run(a_log(code=BY_UUID)).machine.gpu == "NVIDIA H200"


def test_readings_quoted_in_embedded_code_are_not_read():
    quote = val_line(300, 1.5)
    for code in (f'"""\n{quote}"""\n{CODE}', f"{CODE}'''\n{quote}'''\n"):
        run = one_run(a_log(code=code))
        assert run.points == one_run(a_log()).points
        assert run.total_steps == 300
    assert any("1 readings before the end" in note for note in one_run(a_log(code=f"{quote}{CODE}")).notes)


def test_code_that_no_line_ends_is_read_as_log():
    run = one_run(f"import os\n{BY_UUID}{val_line(0, 9.0)}{val_line(300, 3.2)}")
    assert run.final_val_loss == 3.2
    assert run.source is None
    assert run.machine.gpu == "NVIDIA H200"


def test_logs_that_follow_each_other_in_one_file_keep_their_own_code_and_header():
    other = a_log((10.8, 4.4, 3.5, 3.1), code=CODE + "# another\n", header="Using seed=3\n")
    runs = runs_in(a_log(header=BY_UUID) + "peak memory consumption: 5 MiB\n" + other)
    assert [run.source for run in runs] == [CODE, CODE + "# another\n"]
    assert [run.machine.gpu for run in runs] == ["NVIDIA H200", None]
    assert [run.seed for run in runs] == [None, 3]
    assert [run.machine.peak_memory_mib for run in runs] == [5, None]


def test_code_longer_than_any_script_is_not_kept():
    run = one_run(a_log(code=CODE + "# padding\n" * 250_000))
    assert run.source is None
    assert run.final_val_loss == 3.27


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "NaN"])
def test_a_run_that_diverges_is_kept_up_to_there_and_says_so(word):
    run = one_run(val_line(0, 9.0) + val_line(100, 4.0) + val_line(200, word) + val_line(300, 3.2))
    assert (run.final_val_loss, run.complete) == (4.0, False)
    assert any(f"is {word} at step 200" in note for note in run.notes)


@pytest.mark.parametrize(
    "text",
    ["9" * 1000, "1e999", "1e9", "-3.2", "3.2.1", "3_2", "٣.٢", "0x3", "", "3,2", "3.2=", "+3.2", "3.2\t7"],
)
def test_a_loss_that_is_no_loss_is_left_out_and_said(text):
    run = one_run(val_line(0, 9.0) + val_line(300, text))
    assert (run.final_val_loss, run.complete) == (9.0, False)
    assert any("is no loss" in note and len(note) < 120 for note in run.notes) or not text


def test_a_step_of_a_thousand_digits_is_no_reading():
    assert runs_in(f"step:{'9' * 1000}/{'9' * 1000} val_loss:3.2 train_time:1s\n") == []
    assert one_run(val_line(100, 3.2, f"{'9' * 1000}s")).train_seconds is None


def test_two_losses_in_one_line_are_none():
    run = one_run(val_line(0, 9.0) + "step:300/300 val_loss:3.2 val_loss:3.1 train_time:1s\n")
    assert run.final_val_loss == 9.0
    assert any("'3.2 and 3.1'" in note for note in run.notes)


def test_a_number_cut_by_the_end_of_the_file_is_not_believed():
    whole = val_line(0, "9.12345") + val_line(100, "4.12345")
    assert one_run(whole + "step:200/300 val_loss:3.2").final_val_loss == 4.12345
    assert any("ends within" in note for note in one_run(whole + "step:200/300 val_loss:3.2").notes)
    assert one_run(whole + "step:200/300 val_loss:3.27123").final_val_loss == 3.27123
    assert one_run(whole + "step:200/300 val_loss:3.2 train_time:12.").final_val_loss == 3.2
    assert one_run(whole + "step:200/300 val_loss:3.2 train_time:12.").train_seconds is None
    assert one_run(whole + "step:200/300 val_loss:3.2 train_time:12s step_a").train_seconds == 12


def test_a_last_loss_with_as_many_digits_as_any_before_is_whole_though_no_line_end_follows():
    assert one_run("s:0 tel:11.0\ns:250 tel:6.15", llmc).final_val_loss == 6.15
    assert one_run("s:0 tel:11.05\ns:250 tel:6.0\ns:500 tel:5.1", llmc).final_val_loss == 6.0
    assert runs_in("s:0 tel:11.0", llmc) == []


def test_a_clock_that_goes_back_late_is_told():
    run = one_run(
        "".join(val_line(step, 3.0, f"{time}s") for step, time in ((0, 0), (100, 50), (200, 10), (300, 20)))
    )
    assert any("goes back between steps 100 and 200" in note for note in run.notes)


def test_main_log_of_llmc_has_losses_and_no_clock():
    text = "s:0 tel:10.9\ns:0 trl:10.8 lr:1.0e-04 norm:2.1\ns:0 eval:0.25\ns:250 trl:6.1\ns:250 tel:6.0\n"
    run = one_run(text, llmc)
    assert run.points == (LoggedPoint(0, None, 10.9), LoggedPoint(250, None, 6.0))
    assert (run.total_steps, run.train_seconds, run.complete, run.last_step) == (None, None, True, 250)
    assert not one_run(text + "s:251 trl:6.0\n", llmc).complete
    assert [len(run.points) for run in runs_in(text + text, llmc)] == [2, 2]
    assert one_run("s:0 tel:10.968871\ns:250 tel:6.0", llmc).points[-1].step == 0


def test_stdout_of_nanogpt_has_losses_and_the_last_step_only_if_the_config_was_printed():
    text = (
        "step 0: train loss 4.2874, val loss 4.2823\n"
        "iter 0: loss 4.2654, time 22.1ms, mfu -100.00%\n"
        "iter 10: loss 3.1, time 12.3ms, mfu 5.1%\n"
        "step 250: train loss 2.4, val loss 2.5012\n"
        "saving checkpoint to out\n"
    )
    run = one_run(text, nanogpt)
    assert run.points == (LoggedPoint(0, None, 4.2823), LoggedPoint(250, None, 2.5012))
    assert (run.total_steps, run.train_seconds, run.seed) == (None, None, None)
    said = one_run(f"max_iters = 600000\nOverriding: max_iters = 250\nOverriding: seed = 7\n{text}", nanogpt)
    assert (said.total_steps, said.complete, said.seed) == (250, True, 7)
    assert [len(run.points) for run in runs_in(text + text, nanogpt)] == [2, 2]
    diverged = one_run(text + "step 500: train loss nan, val loss nan\n", nanogpt)
    assert (diverged.final_val_loss, diverged.complete) == (2.5012, False)


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        (modded_nanogpt, "step:1/2 train_time:1ms step_avg:nanms\n"),
        (llmc, "s:0 trl:10.9\n"),
        (nanogpt, "iter 0: loss 4.2, time 22.1ms, mfu -100.00%\n"),
    ],
)
def test_a_format_is_recognised_by_its_own_lines_alone(importer, line):
    assert [one.NAME for one in (modded_nanogpt, llmc, nanogpt) if one.recognises(line)] == [importer.NAME]
    assert not importer.recognises(" " + line)
