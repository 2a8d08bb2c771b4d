# Link options for programs that use LibTorch. Also installed with posenc's package.
#
# The linker looks for dependencies of libtorch_cuda in the folder of the CUDA Toolkit first. Some toolkits contain an
# NCCL that is older than LibTorch's, so that symbols are missing: with LibTorch 2.12 and NCCL 2.28, ncclCommResume and
# others. LibTorch's wheels have the right NCCL in a folder beside torch.
get_filename_component(posenc_nccl "${Torch_DIR}/../../../../nvidia/nccl/lib" ABSOLUTE)
if(TARGET torch_cuda AND EXISTS "${posenc_nccl}")
  target_link_options(torch INTERFACE "LINKER:-rpath-link,${posenc_nccl}")
endif()
unset(posenc_nccl)
