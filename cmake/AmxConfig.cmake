# amx_config(SOURCE): ggml's AMX kernels in llama.cpp's tree SOURCE, with native/amx_config.h before
# them. Called after add_subdirectory.
set(amx_header "${CMAKE_CURRENT_LIST_DIR}/../native/amx_config.h")
function(amx_config source)
    if (CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        set_property(SOURCE "${source}/ggml/src/ggml-cpu/amx/mmq.cpp" DIRECTORY "${source}/ggml/src"
                     APPEND PROPERTY COMPILE_OPTIONS -include "${amx_header}")
    endif()
endfunction()
