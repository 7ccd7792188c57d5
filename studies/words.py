"""The texts of the page around its tables."""

from __future__ import annotations

from dataclasses import dataclass

HEAD = """# Does flatness predict generalisation?

You want to know what a flatness measure tells about how a network does on new data. This page is the answer of an
experiment that anyone can repeat: `make study RESULTS=folder` trains and measures the networks anew, analyses them and
writes this page. Without `RESULTS` it takes the tables that are in `studies/results`, and measures what is missing there.
`make study-cifar ARRAYS=folder` does the same for CIFAR-10. All numbers come from these tables, by `python -m studies page`.

How it avoids flattering the package:

- All measures are shown with all targets, baselines first, at all snapshots; those that take longest, and the
  channel-wise ones, are measured at the main snapshot only. None was left out for its result.
- The main snapshot, the main targets and the sign that each number is expected to have were fixed in the code before
  any result was seen. Networks are compared at equal *training* loss, since flatness follows the loss.
- Errors count configurations, not networks: seeds of one configuration are not independent evidence.
- The best baseline is found by looking, which makes it harder for the package.
- p-values are corrected for the number of values looked at (Holm). The correction hides what speaks for the package,
  and what speaks against it, so the counts without it are given as well.
- What was added after the results had been seen: τ given the label noise, granulated τ without steps in label noise,
  settings known before training, and τ by noise level.
"""

FOUND = "## What was found\n\n"

DIGITS_WORDS = """Plain CNNs of three convolutions with BatchNorm, 12 to 24 channels, on 200 of scikit-learn's 1,797 digits;
the other 1,597 are the test images. Batch size (10, 25, 100) x learning rate (0.02, 0.05, 0.1, 0.2) x weight decay
(0, 0.001) x label noise (0, 10, 20 % of the labels wrong), three seeds each: 216 networks, SGD with momentum 0.9 and a
constant learning rate, 120 epochs. Measures and baselines are those of the 200 training images with the labels that
were trained on. Eigenvalues and the spectrum of the whole network (20 Lanczos steps, 2 probes) are measured at one
snapshot only, since they take the longest."""

STAR_WORDS = """A plain CNN with BatchNorm, of four convolutions with 16 to 64 channels, on 1,000 images, and arms that
change one hyper-parameter each, three seeds; {tests} test images. Measures are those of 256 training images. The
networks are small and see few images, so their accuracy is far below what CIFAR-10 allows. The arms are chosen, not
drawn, so an interval says how much the numbers depend on single arms, and no more."""


@dataclass(frozen=True)
class ShiftWords:
    """The words of a section on distorted images: the data, which networks, and more about the images."""

    data: str
    networks: str
    images: str = ""


SHIFTS = {
    "shift": ShiftWords("Digits", "the digits' networks (one seed, no weight decay)"),
    "shift-cifar": ShiftWords(
        "CIFAR-10",
        "the star's networks (one seed; the centre, and an arm each for most hyper-parameters)",
        "*Small* images are scaled down on a black canvas, *coarse* ones are brought to half the resolution and enlarged "
        "again, *faint* ones have less contrast. ",
    ),
}

BELOW = """## Limits

- The networks are small, the digits are easy, and all of them are image CNNs with ReLU. Nothing here is about
  transformers, language, or networks of millions of weights.
- Choosing which hyper-parameters differ, and over which range, decides much about every τ. Batch size, learning rate
  and label noise act on flatness and on generalisation at once; *within noise levels*, *granulated* and *given lr/batch*
  take some of that out, not all.
- A snapshot at a loss is taken when the loss is first reached. The order at convergence may differ: see the snapshots at
  fixed epochs.
- Measures are those of the training images. Test images would tell more, and need the very images whose error is to be
  predicted.
- All networks on the digits have the same training images. Three seeds are three initialisations, and three choices of
  wrong labels. Intervals do not count that.
- Another machine rounds otherwise, so its networks are others. Its numbers agree with these within the intervals, not
  to the digit.

## Sources

Petzka et al. 2021 (arXiv 2001.00939), relative flatness and the protocol with Pearson's r · Jiang et al. 2020 (arXiv
1912.02178), granulated τ, random perturbations · Dziugaite et al. 2020 (arXiv 2010.11924), worst environments · Liang et
al. 2019 (arXiv 1711.01530), Fisher–Rao norm · Thomas et al. 2020 (arXiv 1906.07774), Takeuchi criterion · Foret et al.
2021 (arXiv 2010.01412), SAM · Kwon et al. 2021 (arXiv 2102.11600), ASAM · Gabdullin 2024 (arXiv 2412.10146) and 2025
(arXiv 2504.17618), r_e, K_Hn, C_t and changes of the data · Guo et al. 2017 (arXiv 1706.04599), temperature · Holm 1979.
"""
