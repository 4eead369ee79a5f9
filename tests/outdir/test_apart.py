"""OUT_DIR never takes the place of an input or of the current directory, whatever names lead to them."""

import os

import pytest
from build import files_of, write_adapter, write_checkpoint

import lorafuse
from lorafuse.batching.jobs import Job, refuse_overlap
from lorafuse.errors import OutDirError, UsageError
from lorafuse.files.local_folder import LocalFolder
from lorafuse.outdir import apart
from lorafuse.outdir.local import check_out_dir


@pytest.fixture
def inputs(tmp_path):
    return write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "adapter")


@pytest.fixture
def mounted(monkeypatch):
    """mounted(a, b) → the directory b is at the place a too, as after mount --bind b a."""

    def mount(at, source):
        real = apart._id

        def found(path):
            inside = path == at or at in path.parents
            return real(source / path.relative_to(at) if inside else path)

        monkeypatch.setattr(apart, "_id", found)

    return mount


def overlap(out, path):
    return f"{out}: is, contains or lies inside the input {path}; choose another directory."


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_name_is_refused(overwrite, inputs, tmp_path, monkeypatch):
    """Python takes it for the current directory, which --overwrite would empty."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UsageError) as e:
        lorafuse.convert(*inputs, "", overwrite=overwrite)
    assert str(e.value) == "the name of the output directory is empty." and e.value.exit_code == 2
    assert files_of(tmp_path / "work") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("out", [".", "./", "..", "../..", "../work", "../link"])
def test_the_current_directory_stays(out, inputs, tmp_path, monkeypatch):
    """It, and what it lies in; a shell would be left in a directory that is gone."""
    here = tmp_path / "deep/er/work"
    here.mkdir(parents=True)
    (tmp_path / "deep/er/link").symlink_to("work")
    monkeypatch.chdir(here)
    for overwrite in (False, True):
        with pytest.raises(OutDirError) as e:
            lorafuse.convert(*inputs, out, overwrite=overwrite)
        assert str(e.value) == f"{out}: is the current directory, or contains it; choose another directory."
        assert e.value.exit_code == 7 and os.path.samefile(os.curdir, here)


def test_a_directory_in_or_beside_the_current_one_is_written(inputs, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    lorafuse.convert(*inputs, "out")
    lorafuse.convert(*inputs, "../out")
    assert (tmp_path / "work/out/config.json").exists() and (tmp_path / "out/config.json").exists()


def test_a_current_directory_that_is_gone_does_not_matter(inputs, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    check_out_dir(str(tmp_path / "out"), [LocalFolder(inputs[0])], overwrite=False)


@pytest.mark.parametrize("where", ["alias", "alias/merged", "alias/deep/er"])
def test_an_input_by_another_name_is_refused(where, inputs, tmp_path, mounted):
    """A bind mount of the checkpoint (docker run -v base:/in -v base:/out), and what lies in it."""
    ckpt, adapter = inputs
    (tmp_path / "alias").mkdir()
    before = files_of(tmp_path)
    mounted(tmp_path / "alias", ckpt)
    with pytest.raises(OutDirError) as e:
        lorafuse.convert(ckpt, adapter, tmp_path / where, overwrite=True)
    assert str(e.value) == overlap(tmp_path / where, ckpt)
    assert files_of(tmp_path) == before


def test_an_input_that_is_mounted_from_inside_the_output_is_refused(inputs, tmp_path, mounted):
    """What --overwrite removes may be the input by a name that says nothing of it."""
    (tmp_path / "out/deep/base").mkdir(parents=True)
    mounted(inputs[0], tmp_path / "out/deep/base")
    out = str(tmp_path / "out")
    with pytest.raises(OutDirError) as e:
        check_out_dir(out, [LocalFolder(inputs[0])], overwrite=True)
    assert str(e.value) == overlap(out, inputs[0])


def test_an_input_of_links_into_the_output_is_refused(inputs, tmp_path):
    """The files that are read lie in OUT_DIR then. A link to its neighbour is none of its business."""
    (tmp_path / "out").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links/model.safetensors").symlink_to("../out/model.safetensors")
    (tmp_path / "out/model.safetensors").write_bytes(b"")
    folder = LocalFolder(tmp_path / "links")
    with pytest.raises(OutDirError) as e:
        check_out_dir(str(tmp_path / "out"), [folder], overwrite=True)
    assert str(e.value) == overlap(tmp_path / "out", tmp_path / "links")
    check_out_dir(str(tmp_path / "out2"), [folder], overwrite=True)
    check_out_dir(str(tmp_path / "out/merged"), [folder], overwrite=True)


def test_a_batch_knows_its_inputs_by_other_names(inputs, tmp_path, mounted):
    """Its root, and the place of each result."""
    ckpt, adapter = inputs
    (tmp_path / "root/a").mkdir(parents=True)
    mounted(tmp_path / "root/a", adapter)
    jobs = [Job(str(adapter), "b"), Job(str(tmp_path / "other"), "a")]
    with pytest.raises(OutDirError) as e:
        refuse_overlap(jobs, LocalFolder(tmp_path / "root"), LocalFolder(ckpt))
    expected = f"{tmp_path}/root: the result a would take the place of the input {adapter}."
    assert str(e.value) == expected
    refuse_overlap(jobs[:1], LocalFolder(tmp_path / "root"), LocalFolder(ckpt))
    mounted(tmp_path / "root", ckpt)
    with pytest.raises(OutDirError) as e:
        refuse_overlap(jobs[:1], LocalFolder(tmp_path / "root/x"), LocalFolder(ckpt))
    assert str(e.value) == f"{tmp_path}/root/x: is or lies inside the input {ckpt}; choose another directory."
