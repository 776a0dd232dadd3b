# libllama's models are many small files that include the same headers: compiled together they take a
# fraction of the time. The pin's alone, whose names are known not to meet within a group.
set(PLB_MODELS_TOGETHER 16 CACHE STRING "Files of src/models compiled at once; 1: each alone")
if (EXISTS "${PLB_LLAMA_SOURCE}/.pyllamabatch-lock" AND PLB_MODELS_TOGETHER GREATER 1)
    file(GLOB models CONFIGURE_DEPENDS "${PLB_LLAMA_SOURCE}/src/models/*.cpp")
    set(n 0)
    foreach(model ${models})
        math(EXPR group "${n} / ${PLB_MODELS_TOGETHER}")
        set_source_files_properties("${model}" DIRECTORY "${PLB_LLAMA_SOURCE}/src"
            PROPERTIES UNITY_GROUP models${group})
        math(EXPR n "${n} + 1")
    endforeach()
    set_target_properties(llama PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
endif()
