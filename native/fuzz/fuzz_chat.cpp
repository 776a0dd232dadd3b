// Chats: the request's JSON before the first zero byte, an answer behind it.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const time_limit limit;
    static plb_chat_template * chatml = plb_chat_template_new(shared_fixture().model, "chatml");
    CHECK(chatml != nullptr);
    const std::string all((const char *) data, size);
    const std::string request = all.substr(0, all.find('\0'));
    const std::string answer  = request.size() < size ? all.substr(request.size() + 1) : "";
    if (!is_shallow(request) || request.find("ref") != std::string::npos) {
        return 0;
    }
    plb_chat_parser * parser = nullptr;
    char * rendered = plb_chat_render(chatml, request.c_str(), &parser);
    CHECK((rendered != nullptr) == (parser != nullptr));
    if (rendered != nullptr) {
        for (const bool partial : {true, false}) {
            plb_text_free(plb_chat_parse(parser, answer.c_str(), answer.size(), partial));
        }
    }
    plb_text_free(rendered);
    plb_chat_parser_free(parser);
    return 0;
}
