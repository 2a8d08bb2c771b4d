# How programs link with the libraries that LibTorch needs. The package of posenc reads this file too.
#
# The linker looks for what libtorch_cuda needs in the folder of the CUDA Toolkit first. Some toolkits have an NCCL of
# their own. Where it is older than LibTorch's, symbols are missing: ncclCommResume and others with LibTorch 2.12 and
# NCCL 2.28. The wheels of LibTorch have theirs in a folder beside torch.
get_filename_component(posenc_nccl "${Torch_DIR}/../../../../nvidia/nccl/lib" ABSOLUTE)
if(TARGET torch_cuda AND EXISTS "${posenc_nccl}")
  target_link_options(torch INTERFACE "LINKER:-rpath-link,${posenc_nccl}")
endif()
unset(posenc_nccl)
