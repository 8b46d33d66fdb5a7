"""Pack and unpack boxes of strided tensors. Installed as ``tricomm.kernels``; knows torch, nothing of tricomm."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package tricomm.kernels and 'kernels' on the package index is another project: "
        "run 'pip install -e .' in the checkout and write 'import tricomm.kernels'"
    )
