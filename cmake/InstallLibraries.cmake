# Install the module, our copies of the shared libraries and the licences, and nothing else:
# upstream's own install rules belong to another component.
set(libraries llama ggml ggml-base ${GGML_AVAILABLE_BACKENDS})
set(library_folder pyllamabatch/lib)
if (APPLE)
    set(origin "@loader_path")
else()
    set(origin "$ORIGIN")
endif()

# A wheel carries no symbolic links, so no versioned names either.
set_property(TARGET ${libraries} PROPERTY VERSION)
set_property(TARGET ${libraries} PROPERTY SOVERSION)
set_property(TARGET ${libraries} PROPERTY PUBLIC_HEADER)
set_target_properties(${libraries} PROPERTIES
    INSTALL_RPATH "${origin}" BUILD_WITH_INSTALL_RPATH OFF MACOSX_RPATH ON)
include(CheckLinkerFlag)
check_linker_flag(CXX LINKER:--exclude-libs,ALL PLB_EXCLUDE_LIBS)  # zig's linker does not know it
if (CMAKE_SYSTEM_NAME STREQUAL "Linux" AND PLB_EXCLUDE_LIBS)
    # CUDA's static libraries may bring a part of libstdc++ along, and some compilers link all of it;
    # a copy that the other libraries would find before the real one crashes them, or this module.
    foreach(library ${libraries} _native)
        target_link_options(${library} PRIVATE LINKER:--exclude-libs,ALL)
    endforeach()
endif()
set_target_properties(_native PROPERTIES INSTALL_RPATH "${origin}/lib" MACOSX_RPATH ON)

install(TARGETS _native LIBRARY DESTINATION pyllamabatch COMPONENT pyllamabatch)
install(TARGETS ${libraries} LIBRARY DESTINATION ${library_folder} COMPONENT pyllamabatch
        RUNTIME DESTINATION ${library_folder} COMPONENT pyllamabatch)
if (SKBUILD_METADATA_DIR)
    install(FILES "${PLB_LLAMA_SOURCE}/LICENSE" DESTINATION "${SKBUILD_METADATA_DIR}/licenses/llama.cpp"
            COMPONENT pyllamabatch)
endif()
add_dependencies(_native ${libraries})
