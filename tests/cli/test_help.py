import resource
import subprocess
import sys
from importlib import metadata


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
    # CPU time: what the rest of the machine is doing does not count.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "autofit", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_version_is_the_package_s():
    code = "import autofit; print(autofit.__version__)"  # the other public names: tests/test_public.py
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == metadata.version("autofit-qlora")
