import subprocess
import sys
import time


def test_help_answers_at_once_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "import autofit, autofit.space.ladder, autofit.cli.main\n"
        "from typer.testing import CliRunner\n"
        "for args in (['--help'], ['run', '--help']):\n"
        "    assert CliRunner().invoke(autofit.cli.main.app, args).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'optuna', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "autofit", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0  # 0.3 s on an idle machine; torch alone takes longer than this


def test_the_public_names_are_these():
    import autofit

    assert {name for name in vars(autofit) if not name.startswith("_")} - {
        *("space", "errors", "cli", "config", "search", "trial", "training", "step", "memory", "report")
    } == set()
    assert autofit.__version__
