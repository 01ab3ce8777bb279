import sys

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageCms

from raylarge.errors import SlideError, UserError
from raylarge.slides.dicom_reader import DicomPyramid
from raylarge.slides.openslide_reader import OpenSlidePyramid
from raylarge.slides.protocol import ReadOptions
from raylarge.slides.reader import open_slide

pydicom = pytest.importorskip("pydicom", reason="the extra raylarge[dicom] is not installed")
pytest.importorskip("wsidicom", reason="the extra raylarge[dicom] is not installed")

from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TILE = 64
SYNTAXES = {
    "plain": (uid.ExplicitVRLittleEndian, None, "RGB"),
    "jpeg2000": (
        uid.JPEG2000Lossless,
        lambda tile: imagecodecs.jpeg2k_encode(tile, level=0, codecformat="j2k"),
        "YBR_RCT",
    ),
    "jpeg-ls": (uid.JPEGLSLossless, imagecodecs.jpegls_encode, "RGB"),
    "htj2k": (
        uid.HTJ2KLossless,
        lambda tile: imagecodecs.htj2k_encode(tile, reversible=True),
        "YBR_RCT",
    ),
}


def dataset(**tags):
    made = Dataset()
    for name, value in tags.items():
        setattr(made, name, value)
    return made


def code(value, meaning, scheme="SCT"):
    return [dataset(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)]


def write_instance(path, image, flavour, mpp, series, syntax="plain"):
    """One TILED_FULL instance of a whole slide, with a patient's name and number."""
    kind, encode, photometric = SYNTAXES[syntax]
    rows, columns = image.shape[:2]
    down, across = -(-rows // TILE), -(-columns // TILE)
    pads = ((0, down * TILE - rows), (0, across * TILE - columns), (0, 0))
    padded = np.pad(image, pads, mode="edge")
    tiles = padded.reshape(down, TILE, across, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    instance, spacing = uid.generate_uid(), mpp / 1000
    flavours = ["ORIGINAL", "PRIMARY", flavour, "NONE"]
    optics = dataset(
        OpticalPathIdentifier="1",
        ICCProfile=SRGB,
        IlluminationTypeCodeSequence=code("111744", "Brightfield illumination", "DCM"),
        IlluminationColorCodeSequence=code("371251000", "White"),
    )
    shared = dataset(
        PixelMeasuresSequence=[dataset(PixelSpacing=[spacing, spacing], SliceThickness=0.001)],
        WholeSlideMicroscopyImageFrameTypeSequence=[dataset(FrameType=flavours)],
        OpticalPathIdentificationSequence=[dataset(OpticalPathIdentifier="1")],
    )
    made = dataset(
        SOPClassUID=WHOLE_SLIDE,
        SOPInstanceUID=instance,
        ImageType=flavours,
        StudyInstanceUID=f"{series}.1",
        SeriesInstanceUID=series,
        Modality="SM",
        FrameOfReferenceUID=f"{series}.2",
        InstanceNumber=1,
        SeriesNumber=1,
        PatientName="Doe^Jane",
        PatientID="SECRET-1",
        AccessionNumber="SECRET-2",
        Manufacturer="raylarge",
        ManufacturerModelName="test",
        StudyID="1",
        DeviceSerialNumber="1",
        SoftwareVersions="1",
        ContainerIdentifier="SECRET-3",
        ContainerTypeCodeSequence=code("433466003", "Microscope slide"),
        SpecimenDescriptionSequence=[
            dataset(
                SpecimenIdentifier="1", SpecimenUID=f"{series}.3", SpecimenPreparationSequence=[]
            )
        ],
        VolumetricProperties="VOLUME",
        FocusMethod="AUTO",
        ExtendedDepthOfField="NO",
        SpecimenLabelInImage="NO",
        BurnedInAnnotation="NO",
        ImagedVolumeWidth=columns * spacing,
        ImagedVolumeHeight=rows * spacing,
        ImagedVolumeDepth=1.0,
        TotalPixelMatrixColumns=columns,
        TotalPixelMatrixRows=rows,
        TotalPixelMatrixFocalPlanes=1,
        NumberOfOpticalPaths=1,
        TotalPixelMatrixOriginSequence=[
            dataset(XOffsetInSlideCoordinateSystem="0", YOffsetInSlideCoordinateSystem="0")
        ],
        ImageOrientationSlide=["0", "-1", "0", "-1", "0", "0"],
        OpticalPathSequence=[optics],
        DimensionOrganizationSequence=[dataset(DimensionOrganizationUID=f"{series}.4")],
        DimensionOrganizationType="TILED_FULL",
        SharedFunctionalGroupsSequence=[shared],
        SamplesPerPixel=3,
        PhotometricInterpretation=photometric,
        PlanarConfiguration=0,
        NumberOfFrames=len(tiles),
        Rows=TILE,
        Columns=TILE,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        LossyImageCompression="00",
    )
    frames = [tile.tobytes() if encode is None else encode(tile.copy()) for tile in tiles]
    made.add_new("PixelData", "OB", b"".join(frames) if encode is None else encapsulate(frames))
    made["PixelData"].is_undefined_length = encode is not None
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID = WHOLE_SLIDE
    made.file_meta.MediaStorageSOPInstanceUID = instance
    made.file_meta.TransferSyntaxUID = kind
    made.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def image():
    noise = np.random.default_rng(0).integers(0, 256, (20, 26, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((260, 200), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def slides(tmp_path_factory, image):
    """One folder per transfer syntax: a label, and a pyramid of two levels."""
    root = tmp_path_factory.mktemp("dicom")
    for name in SYNTAXES:
        (root / name).mkdir()
        series = uid.generate_uid()[:50]
        write_instance(root / name / "a.dcm", image[:64, :64], "LABEL", 1.0, series, name)
        write_instance(root / name / "b.dcm", image, "VOLUME", 0.25, series, name)
        write_instance(root / name / "c.dcm", image[::2, ::2], "VOLUME", 0.5, series, name)
    return root


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("name", ["", "b.dcm", "c.dcm"])
def test_a_folder_or_any_instance_is_the_whole_pyramid(slides, image, syntax, name):
    with open_slide(str(slides / syntax / name)) as slide:
        kind = OpenSlidePyramid if syntax in ("plain", "jpeg2000") else DicomPyramid
        assert isinstance(slide._pyramid, kind)
        assert slide._pyramid.sizes == [(200, 260), (100, 130)]  # and no label
        assert (slide.mpp, slide.zoom) == (0.25, 2.0)
        assert (slide.read(0, 0, 100, 130) == image[::2, ::2]).all()
        assert (slide.read(11, 23, 50, 70) == image[::2, ::2][11:61, 23:93]).all()
    with open_slide(str(slides / syntax / name), base_mpp=0.25) as slide:
        assert (slide.read(0, 0, 200, 260) == image).all()


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_profile_of_the_optical_path_is_found_and_no_patient(slides, syntax):
    with open_slide(str(slides / syntax)) as slide:
        assert len(slide._pyramid.icc_profile) >= len(SRGB) - 64
        told = f"{vars(slide)} {slide.georeference} {vars(slide._pyramid)['mpp_hints']}"
    assert "SECRET" not in told
    assert "Doe" not in told


def test_several_slides_in_a_folder_are_refused(tmp_path, image):
    for name in "ab":
        series = uid.generate_uid()[:50]
        write_instance(tmp_path / f"{name}.dcm", image, "VOLUME", 0.5, series)
    with pytest.raises(SlideError, match=r"the folder holds 2 DICOM slides; name a slide's"):
        open_slide(str(tmp_path))


def test_a_series_of_a_folder_is_a_scene(tmp_path, image):
    series = sorted(uid.generate_uid()[:50] for _ in range(2))
    for name, one, pixels in zip("ab", series, (image, 255 - image), strict=True):
        write_instance(tmp_path / f"{name}.dcm", pixels, "VOLUME", 0.5, one)
    for scene, expected in (("0", image), ("1", 255 - image), (series[1], 255 - image)):
        with open_slide(str(tmp_path), options=ReadOptions(scene=scene)) as slide:
            assert (slide.read(0, 0, 200, 260) == expected).all()
    with pytest.raises(SlideError, match=r"holds 2 DICOM slides; .*tile\.scene="):
        open_slide(str(tmp_path), options=ReadOptions(scene="2"))


@pytest.mark.parametrize("syntax", ["plain", "jpeg-ls"])
def test_a_truncated_slide_is_one_sentence(tmp_path, image, syntax):
    write_instance(tmp_path / "a.dcm", image, "VOLUME", 0.5, uid.generate_uid()[:50], syntax)
    content = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(content[: len(content) // 2])
    with (
        pytest.raises(
            SlideError, match=r"^slide \S+a\.dcm: the file is damaged or incomplete [^\n]+\.$"
        ),
        open_slide(str(tmp_path / "a.dcm")) as slide,
    ):
        slide.read(0, 0, 200, 260)


def test_without_wsidicom_the_cure_is_named(slides, monkeypatch):
    monkeypatch.setitem(sys.modules, "wsidicom", None)
    with open_slide(str(slides / "plain/b.dcm")) as slide:
        assert slide.size_px == (100, 130)
    cure = r".*'raylarge\[dicom\]'"
    with pytest.raises(UserError, match=r"Unsupported transfer syntax " + cure) as told:
        open_slide(str(slides / "jpeg-ls/b.dcm"))
    assert told.type is UserError  # no fault of the slide
    with pytest.raises(UserError, match=r"the folder may hold DICOM; " + cure) as told:
        open_slide(str(slides / "plain"))
    assert told.type is UserError


@pytest.mark.s3
def test_a_folder_of_a_store_is_fetched(slides, image, s3_bucket, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("RAYLARGE_CACHE", str(tmp_path))
    fs, root = fsspec.core.url_to_fs(f"{s3_bucket}/dicom/slide")
    for file in sorted((slides / "plain").iterdir()):
        fs.put_file(str(file), f"{root}/{file.name}")
    with open_slide(f"{s3_bucket}/dicom/slide", base_mpp=0.25) as slide:
        assert (slide.read(0, 0, 200, 260) == image).all()
