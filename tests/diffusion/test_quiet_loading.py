"""Loading is quiet, and everything speaks again afterwards as it did before."""

import diffusers
import pytest
import transformers

from dmquant.diffusion.pipeline import open_pipeline
from dmquant.diffusion.quiet_loading import loading_quietly
from tests.text import make_text_pipeline


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_opening_a_text_pipeline_says_nothing(tmp_path, capfd):
    make_text_pipeline().save_pretrained(tmp_path)
    capfd.readouterr()
    assert open_pipeline(tmp_path).tokenizer is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("has_bars", [True, False])
def test_what_was_heard_before_is_heard_again_also_after_an_error(has_bars):
    speakers = [package.utils.logging for package in (diffusers, transformers)]
    found = [(speaker.get_verbosity(), speaker.is_progress_bar_enabled()) for speaker in speakers]
    try:
        for speaker in speakers:
            speaker.set_verbosity_info()
            (speaker.enable_progress_bar if has_bars else speaker.disable_progress_bar)()
        with pytest.raises(KeyError), loading_quietly():
            assert not any(speaker.is_progress_bar_enabled() for speaker in speakers)
            assert all(speaker.get_verbosity() == speaker.ERROR for speaker in speakers)
            raise KeyError
        assert all(speaker.is_progress_bar_enabled() == has_bars for speaker in speakers)
        assert all(speaker.get_verbosity() == speaker.INFO for speaker in speakers)
    finally:
        for speaker, (verbosity, had_bars) in zip(speakers, found):
            speaker.set_verbosity(verbosity)
            (speaker.enable_progress_bar if had_bars else speaker.disable_progress_bar)()
