# amx_config(SOURCE): ggml's AMX kernels in llama.cpp's tree SOURCE, with native/amx_config.h before
# them. Called after add_subdirectory.
set(amx_header "${CMAKE_CURRENT_LIST_DIR}/../native/amx_config.h")
function(amx_config source)
    if (MSVC)
        return()
    endif()
    set(kernels "${source}/ggml/src/ggml-cpu/amx/mmq.cpp")
    set(options -include "${amx_header}")
    # Only for kernels that have the fault: another llama.cpp may be without.
    file(STRINGS "${kernels}" fault REGEX "\\(float \\*\\) dst->data \\+ dst_offset")
    if (fault)
        list(APPEND options -DPLB_AMX_BATCHES)
    endif()
    set_property(SOURCE "${kernels}" DIRECTORY "${source}/ggml/src"
                 APPEND PROPERTY COMPILE_OPTIONS ${options})
endfunction()
