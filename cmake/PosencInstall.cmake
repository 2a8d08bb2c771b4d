# cmake --install: the library, its headers, its licence and the files for find_package(posenc).

include(CMakePackageConfigHelpers)

set(POSENC_CMAKEDIR "${CMAKE_INSTALL_LIBDIR}/cmake/posenc")

install(TARGETS posenc EXPORT posencTargets)
install(DIRECTORY include/posenc DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.h")
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DOCDIR}")
install(EXPORT posencTargets NAMESPACE posenc:: DESTINATION "${POSENC_CMAKEDIR}")

configure_package_config_file(cmake/posencConfig.cmake.in "${PROJECT_BINARY_DIR}/posencConfig.cmake"
                              INSTALL_DESTINATION "${POSENC_CMAKEDIR}")
# Minor versions of 0.x may break interfaces.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/posencConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/posencConfig.cmake" "${PROJECT_BINARY_DIR}/posencConfigVersion.cmake"
              cmake/PosencTorchLink.cmake
        DESTINATION "${POSENC_CMAKEDIR}")
