# Finds the headers for fused attention: cuDNN and its graph API (cudnn-frontend, headers only). libcudnn is not linked:
# its functions are looked up at run time in the copy that LibTorch has loaded.
#
# Sets POSENC_CUDNN to OFF, with a warning, if headers are missing.

set(POSENC_CUDNN_FRONTEND_MINIMUM 1.32)  # the release with which the graphs were validated

if(NOT POSENC_CUDA)
  set(POSENC_CUDNN OFF)
endif()
if(POSENC_CUDNN)
  # site-packages, into which torch's dependencies and nvidia-cudnn-frontend install the headers.
  get_filename_component(packages "${TORCH_INSTALL_PREFIX}" DIRECTORY)
  find_path(POSENC_CUDNN_INCLUDE_DIR cudnn.h HINTS "${packages}/nvidia/cudnn/include"
            DOC "Folder of cudnn.h, version 9")
  find_path(POSENC_CUDNN_FRONTEND_INCLUDE_DIR cudnn_frontend.h HINTS "${packages}/include"
            DOC "Folder of cudnn_frontend.h, of the package nvidia-cudnn-frontend")
  mark_as_advanced(POSENC_CUDNN_INCLUDE_DIR POSENC_CUDNN_FRONTEND_INCLUDE_DIR)
  set(missing "")
  if(NOT POSENC_CUDNN_INCLUDE_DIR)
    list(APPEND missing "cudnn.h (POSENC_CUDNN_INCLUDE_DIR)")
  endif()
  if(NOT POSENC_CUDNN_FRONTEND_INCLUDE_DIR)
    list(APPEND missing "cudnn_frontend.h (POSENC_CUDNN_FRONTEND_INCLUDE_DIR)")
  else()
    file(READ "${POSENC_CUDNN_FRONTEND_INCLUDE_DIR}/cudnn_frontend_version.h" header)
    string(REGEX MATCH "CUDNN_FRONTEND_MAJOR_VERSION ([0-9]+)" _ "${header}")
    set(version "${CMAKE_MATCH_1}")
    string(REGEX MATCH "CUDNN_FRONTEND_MINOR_VERSION ([0-9]+)" _ "${header}")
    string(APPEND version ".${CMAKE_MATCH_1}")
    if(version VERSION_LESS POSENC_CUDNN_FRONTEND_MINIMUM)
      list(APPEND missing "cudnn_frontend.h ${POSENC_CUDNN_FRONTEND_MINIMUM} or later (found ${version})")
    endif()
  endif()
  if(missing)
    list(JOIN missing " and " missing)
    message(WARNING "Not found: ${missing}. Attention on CUDA takes its plain path, which is slower; "
                    "set POSENC_CUDNN=OFF to choose that.")
    set(POSENC_CUDNN OFF)
  else()
    message(STATUS "Fused attention: cuDNN ${POSENC_CUDNN_INCLUDE_DIR}, frontend ${version} "
                   "${POSENC_CUDNN_FRONTEND_INCLUDE_DIR}")
  endif()
endif()
