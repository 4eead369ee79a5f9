"""The compiled kernel, which is optional: where there is no C compiler, or not one that knows these options,
lorafuse is installed without it. LORAFUSE_PURE leaves it out."""

import os

from setuptools import Extension, setup

KERNEL = Extension(
    "lorafuse.arithmetic._kernel",
    ["convert/lorafuse/arithmetic/kernel.c"],
    # -O3 vectorizes; the others keep every float what torch makes of it.
    extra_compile_args=[
        "-std=c11",
        "-O3",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-g0",
    ],
    optional=True,
    py_limited_api=True,  # it calls nothing of Python: lorafuse loads it with ctypes
)

if os.environ.get("LORAFUSE_PURE"):
    setup()
else:
    setup(ext_modules=[KERNEL], options={"bdist_wheel": {"py_limited_api": "cp311"}})
