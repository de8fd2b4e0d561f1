"""Running the notebooks and judging the paper's claims: what notebooks ask for.

Light on purpose: `make reproduce` finds out that there is nothing to do within seconds.
"""

from slimllm_nb.reproduce.claims import PaperError, load_claims, published
from slimllm_nb.reproduce.kept import scoreboard
from slimllm_nb.reproduce.profiles import Profile, ProfileError, load_profile, run_folder
from slimllm_nb.reproduce.verdicts import Verdict, by_kind, judge, print_verdicts, save_results, verdict_table

__all__ = [
    "PaperError",
    "Profile",
    "ProfileError",
    "Verdict",
    "by_kind",
    "judge",
    "load_claims",
    "load_profile",
    "print_verdicts",
    "published",
    "run_folder",
    "save_results",
    "scoreboard",
    "verdict_table",
]
